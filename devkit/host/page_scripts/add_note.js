// Adds a note in Markdown at the left.
([text, width]) => {
    const note = LiteGraph.createNode('MarkdownNote')
    note.title = 'How to use'
    app.graph.add(note)
    note.widgets[0].value = text
    note.pos = [0, 0]
    note.setSize([width, 620])
    note.color = '#432'
    note.bgcolor = '#653'
}
