// Builds a workflow; returns it as saved, and the ids of its nodes by name.
async ([note, noteWidth, nodes, gap]) => {
    app.graph.clear()
    const made = {}
    for (const [name, plan] of Object.entries(nodes)) {
        const node = LiteGraph.createNode(plan.type)
        if (!node) throw new Error(`no node ${plan.type}`)
        if (plan.title) node.title = plan.title
        app.graph.add(node)
        made[name] = node
        for (const [input, value] of Object.entries(plan.values)) {
            const widget = node.widgets?.find(widget => widget.name === input)
            if (!widget) throw new Error(`${plan.type} has no widget ${input}: ${node.widgets?.map(w => w.name)}`)
            widget.value = value
            widget.callback?.(value)
        }
        // the frontend randomizes seeds, and every Run would execute their nodes again
        for (const control of (node.widgets ?? []).flatMap(widget => widget.linkedWidgets ?? [])) control.value = 'fixed'
    }
    for (const [name, plan] of Object.entries(nodes))
        for (const [input, [from, output]] of Object.entries(plan.links)) {
            const slot = made[name].findInputSlot(input)
            if (slot < 0) throw new Error(`${plan.type} has no input ${input}: ${made[name].inputs.map(i => i.name)}`)
            if (!made[from].connect(output, made[name], slot)) throw new Error(`${from} does not fit ${name}.${input}`)
        }
    await new Promise(done => setTimeout(done, 300))
    const columns = []
    for (const [name, plan] of Object.entries(nodes)) (columns[plan.column] ??= []).push(name)
    let x = noteWidth + gap[0]
    for (const names of columns.filter(Boolean)) {
        let y = 0, wide = 0
        for (const name of names) {
            const [least, height] = made[name].computeSize()
            made[name].setSize([Math.max(nodes[name].width, least), Math.max(nodes[name].height, height)])
            made[name].pos = [x, y]
            y += made[name].size[1] + gap[1]
            wide = Math.max(wide, made[name].size[0])
        }
        x += wide + gap[0]
    }
    const text = LiteGraph.createNode('MarkdownNote')
    text.title = 'How to use'
    app.graph.add(text)
    text.widgets[0].value = note
    text.pos = [0, 0]
    text.setSize([noteWidth, 620])
    text.color = '#432'
    text.bgcolor = '#653'
    await new Promise(done => setTimeout(done, 300))
    const saved = app.graph.serialize()
    return [saved, Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]))]
}
