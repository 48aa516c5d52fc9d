// Places nodes in columns from x on. ids: by name; sizes: column, least width and height by name.
([ids, sizes, x, gap]) => {
    const columns = []
    for (const [name, { column }] of Object.entries(sizes)) (columns[column] ??= []).push(name)
    for (const names of columns.filter(Boolean)) {
        let y = 0, wide = 0
        for (const name of names) {
            const node = app.graph.getNodeById(ids[name])
            const [least, height] = node.computeSize()
            node.setSize([Math.max(sizes[name].width, least), Math.max(sizes[name].height, height)])
            node.pos = [x, y]
            y += node.size[1] + gap[1]
            wide = Math.max(wide, node.size[0])
        }
        x += wide + gap[0]
    }
}
