// Adds a note in Markdown at the left, in the colours of the host's own notes; returns its id.
([text, width]) => {
    const note = LiteGraph.createNode('MarkdownNote')
    note.title = 'How to use'
    app.graph.add(note)
    note.widgets[0].value = text
    note.pos = [0, 0]
    note.setSize([width, note.computeSize()[1]])
    note.color = '#222'
    note.bgcolor = '#000'
    return note.id
}
