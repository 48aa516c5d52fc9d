// Sets widgets of all nodes of a type, in subgraphs too.
values => {
    const nodesOf = graph => graph._nodes.flatMap(node => node.subgraph ? [node, ...nodesOf(node.subgraph)] : [node])
    for (const [type, widgets] of Object.entries(values))
        nodesOf(app.graph).filter(node => node.type === type).forEach((node, i) => {
            for (const [name, value] of Object.entries(widgets)) {
                const widget = node.widgets.find(widget => widget.name === name)
                widget.value = Array.isArray(value) ? value[i % value.length] : value
                widget.callback?.(widget.value)
            }
        })
}
