// The least size of each node without its title bar, by its id, in the renderer that is on. A note keeps its width.
async () => {
    const TITLE_BAR = 30, FRAMES = 10
    const isNote = node => node.type === 'MarkdownNote'
    const elementOf = node => document.querySelector(`[data-node-id="${node.id}"]`)
    // pixels of a note's text below its lower edge
    const hidden = node => {
        const shown = LiteGraph.vueNodesMode ? elementOf(node) : node.widgets[0].element
        const parts = [shown, ...shown?.querySelectorAll('*') ?? []].filter(Boolean)
        return Math.max(0, ...parts.map(part => part.scrollHeight - part.clientHeight))
    }
    const size = node => {
        const element = LiteGraph.vueNodesMode && elementOf(node)
        const [width, height] = element ? [element.offsetWidth, element.offsetHeight - TITLE_BAR] : node.size
        return [width, height + (isNote(node) ? hidden(node) : 0)]
    }
    const sizes = () => JSON.stringify(app.graph._nodes.map(node => [`${node.id}`, size(node)]))
    const nextFrame = () => new Promise(requestAnimationFrame)

    for (const node of app.graph._nodes) {
        const [width, height] = node.computeSize()
        node.setSize([isNote(node) ? node.size[0] : width, height])
    }
    // Vue draws nodes some frames later
    let last, same = 0
    while (same < FRAMES) {
        await nextFrame()
        const drawn = sizes()
        same = drawn === last ? same + 1 : 0
        last = drawn
    }
    return Object.fromEntries(JSON.parse(last))
}
