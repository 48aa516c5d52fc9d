// The rectangle of each node on the canvas with its title bar, in the renderer that is on: [title, [x, y, width, height]].
() => {
    const TITLE_BAR = 30
    const box = node => {
        const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`)
        const [width, height] = element
            ? [element.offsetWidth, element.offsetHeight]
            : [node.size[0], node.size[1] + TITLE_BAR]
        return [node.pos[0], node.pos[1] - TITLE_BAR, width, height]
    }
    return app.graph._nodes.map(node => [node.title, box(node)])
}
