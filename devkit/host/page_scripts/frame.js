// Moves the canvas to an offset and a scale, and removes what floats above it.
([x, y, scale]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [x, y]
    app.canvas.setDirty(true, true)
    for (const part of ['.graph-canvas-menu', '.minimap-main-container', '.p-toast', '.litegraph-minimap'])
        document.querySelectorAll(part).forEach(element => element.remove())
}
