// Moves and sizes nodes. places: [id, x, y, width, height] of each.
places => {
    for (const [id, x, y, width, height] of places) {
        const node = app.graph.getNodeById(id)
        node.setSize([width, height])
        node.pos = [x, y]
    }
}
