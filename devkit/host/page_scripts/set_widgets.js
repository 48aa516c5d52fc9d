values => {
    for (const [type, widgets] of Object.entries(values))
        app.graph._nodes.filter(node => node.type === type).forEach((node, i) => {
            for (const [name, value] of Object.entries(widgets)) {
                const widget = node.widgets.find(widget => widget.name === name)
                widget.value = Array.isArray(value) ? value[i % value.length] : value
                widget.callback?.(widget.value)
            }
        })
}
