// Replaces the loaders of files that the tests do not have, and both text encoders, by the tests' tiny models.
() => {
    const of = type => app.graph._nodes.filter(node => node.type === type)
    const add = (type, other) => {
        const node = LiteGraph.createNode(type)
        node.pos = other.pos
        app.graph.add(node)
        return node
    }
    const move = (node, output, other, otherOutput) => {
        for (const id of [...(node.outputs[output].links ?? [])]) {
            const link = app.graph.links[id] ?? app.graph.links.get(id)
            other.connect(otherOutput, app.graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    const widget = (node, name) => node.widgets.find(widget => widget.name === name)
    const [checkpoint] = of('CheckpointLoaderSimple'), texts = of('CLIPTextEncode')
    const tiny = add('TinySDXL', checkpoint)
    move(checkpoint, 0, tiny, 0)
    move(checkpoint, 2, tiny, 3)
    for (const text of texts) move(text, 0, tiny, text.title.startsWith('Negative') ? 2 : 1)
    for (const net of of('ControlNetLoader')) move(net, 0, add('TinyControlNet', net), 0)
    for (const lora of of('LoraLoader')) {
        const other = add('LoraLoaderModelOnly', lora)
        tiny.connect(0, other, 0)
        move(lora, 0, other, 0)
        for (const name of ['lora_name', 'strength_model'])
            widget(other, name).value = widget(lora, name).value
    }
    const replaced = [checkpoint, ...texts, ...of('ControlNetLoader'), ...of('LoraLoader')]
    for (const node of replaced) app.graph.remove(node)
}
