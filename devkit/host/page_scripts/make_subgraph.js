// Moves nodes into a subgraph. ids: by name; inputs: [node, input] by the subgraph's name of it; outputs: [node, output].
([title, ids, inputs, outputs]) => {
    const nodes = new Map(Object.entries(ids).map(([name, id]) => [name, app.graph.getNodeById(id)]))
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(nodes.values()))
    // the conversion copies nodes, in their order and under their ids
    const inner = name => subgraph.getNodeById(ids[name])
    for (const [name, [from, input]] of Object.entries(inputs)) {
        const slot = inner(from).inputs.find(slot => slot.name === input)
        if (!slot) throw new Error(`${from} has no input ${input}: ${inner(from).inputs.map(i => i.name)}`)
        subgraph.addInput(name, `${slot.type}`).connect(slot, inner(from))
    }
    for (const [name, [from, output]] of Object.entries(outputs)) {
        const slot = inner(from).outputs[output]
        subgraph.addOutput(name, `${slot.type}`).connect(slot, inner(from))
    }
    // beside the nodes, whose bounds the conversion may know only from an earlier place
    subgraph.inputNode.arrange()
    subgraph.outputNode.arrange()
    const boxes = subgraph.nodes.map(node => ({ left: node.pos[0], right: node.pos[0] + node.size[0] }))
    subgraph.inputNode.pos = [Math.min(...boxes.map(box => box.left)) - subgraph.inputNode.size[0] - 60, 0]
    subgraph.outputNode.pos = [Math.max(...boxes.map(box => box.right)) + 60, 0]
    node.title = subgraph.name = title
    node.setSize([460, Math.max(node.computeSize()[1], 260)])
    node.pos = [0, 0]
}
