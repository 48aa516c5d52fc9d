// Draws one node of a type alone; returns its size.
type => {
    app.graph.clear()
    // the frontend keeps values by the node's number and the widget's name, beyond the node itself
    app.graph.last_node_id = window.lastPictured = (window.lastPictured ?? 0) + 1
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    node.pos = [0, 0]
    const [least, height] = node.computeSize()
    node.setSize([Math.max(340, least), height])
    return [node.size[0], node.size[1]]
}
