// Clears the graph and adds nodes with their values and links; returns their ids by name.
([nodes]) => {
    app.graph.clear()
    const made = {}
    // a blueprint's node, as the frontend adds one from its search
    const fromBlueprint = ({ nodes, definitions }) =>
        app.canvas._deserializeItems({ nodes, subgraphs: definitions.subgraphs }, { position: [0, 0] }).nodes.values().next().value
    for (const [name, plan] of Object.entries(nodes)) {
        const node = plan.blueprint ? fromBlueprint(plan.blueprint) : LiteGraph.createNode(plan.type)
        if (!node) throw new Error(`no node ${plan.type}`)
        if (plan.title) node.title = plan.title
        if (!plan.blueprint) app.graph.add(node)
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
    return Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]))
}
