id => {
    const node = app.graph.getNodeById(id)
    app.canvas.centerOnNode(node)
    app.canvas.selectNode(node)
}
