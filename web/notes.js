// Shows the text of a node's run on the node, until it runs again without one.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { ComfyWidgets } from '../../scripts/widgets.js'

const PACK = 'EasyRef', NAME = 'note'

function show(node, text) {
    let note = node.widgets?.find(widget => widget.name === NAME)
    if (!text) {
        if (note) node.removeWidget(note)
        return
    }
    if (!note) {
        note = ComfyWidgets.STRING(node, NAME, ['STRING', { multiline: true }], app).widget
        // saved neither in a workflow nor in a prompt
        note.serialize = note.options.serialize = false
        note.options.read_only = note.element.readOnly = true
    }
    note.value = text
    node.setDirtyCanvas?.(true, true)
}

// the node of an id such as "5:3", node 3 of the subgraph that node 5 is
function nodeOf(id) {
    let node, graph = app.graph.rootGraph ?? app.graph
    for (const number of `${id}`.split(':')) {
        node = graph?.getNodeById(Number(number))
        graph = node?.subgraph
    }
    return node
}

app.registerExtension({
    name: 'easyref.notes',
    setup() {
        // a node that comes from the cache keeps its note
        api.addEventListener('executing', ({ detail }) => {
            const node = detail && nodeOf(detail)
            if (node?.type?.startsWith(PACK)) show(node, '')
        })
    },
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!nodeData.name.startsWith(PACK)) return
        const executed = nodeType.prototype.onExecuted
        nodeType.prototype.onExecuted = function (output) {
            executed?.apply(this, arguments)
            if (output?.text) show(this, output.text.join('\n'))
        }
    }
})
