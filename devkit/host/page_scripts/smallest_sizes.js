// The least size of each node without its title bar, by its id, in the renderer that is on.
() => {
    const TITLE_BAR = 30
    for (const node of app.graph._nodes) node.setSize(node.computeSize())
    const size = node => {
        if (!LiteGraph.vueNodesMode) return [...node.size]
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        return [element.offsetWidth, element.offsetHeight - TITLE_BAR]
    }
    return Object.fromEntries(app.graph._nodes.map(node => [`${node.id}`, size(node)]))
}
