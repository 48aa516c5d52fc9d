() => app.graph._nodes.filter(node => node.type === 'KSampler').map(node => {
    const source = node.getInputNode(node.findInputSlot('seed')) ?? node
    const seed = source.widgets.find(widget => widget.linkedWidgets)
    seed.linkedWidgets[0].value = 'randomize'
    return `${source.id}`
})
