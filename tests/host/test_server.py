"""The test server itself: events, cache, failures, interruption, and its start."""

from __future__ import annotations

import pytest

from devkit.host import graphs
from devkit.host.server import ComfyServer, PromptFailed, pixels
from devkit.hosts import host_version


def workflow(prompt_tokens: int = 77, **sampler: int) -> graphs.Graph:
    graph = graphs.plain(**{"seed": 1, **sampler})
    graph["tiny"]["inputs"] |= {"seed": 3, "prompt_tokens": prompt_tokens}
    graph["latent"]["inputs"]["height"] = 136
    return graph


def test_server_is_the_host_under_test(server: ComfyServer):
    assert server.system_stats()["system"]["comfyui_version"] == host_version(server.host)
    assert "TinySDXL" in server.object_info()


def test_workflow_gives_an_image_and_then_comes_from_the_cache(server: ComfyServer):
    first = server.queue(workflow())
    (png,) = server.images(server.wait(first))
    assert pixels(png).shape == (136, 128, 3)
    assert pixels(png).std() > 1
    assert set(server.executed(first)) == set(workflow())

    second = server.queue(workflow())
    assert server.images(server.wait(second)) == [png]
    assert server.executed(second) == []
    assert server.cached(second) == set(workflow())


def test_prompts_of_unequal_length_are_sampled_together(server: ComfyServer):
    (png,) = server.images(server.run(workflow(prompt_tokens=154)))
    assert pixels(png).std() > 1


def test_refused_prompt_names_the_input(server: ComfyServer):
    with pytest.raises(PromptFailed, match="prompt_tokens") as failed:
        server.queue(workflow(prompt_tokens=0))
    assert failed.value.kind == "invalid"
    assert "tiny" in failed.value.details["node_errors"]


def test_failed_prompt_names_the_node(server: ComfyServer):
    (server.base / "input" / "broken.png").write_text("no picture")
    graph = {
        "load": graphs.node("LoadImage", image="broken.png"),
        "preview": graphs.node("PreviewImage", images=["load", 0]),
    }
    with pytest.raises(PromptFailed, match="LoadImage") as failed:
        server.run(graph)
    assert failed.value.kind == "execution_error"
    assert failed.value.details["node_id"] == "load"


def test_interrupt_stops_the_running_node(server: ComfyServer):
    prompt_id = server.queue(workflow(seed=4, steps=10000))
    server.wait_executing(prompt_id, "sample")
    server.interrupt()
    with pytest.raises(PromptFailed) as failed:
        server.wait(prompt_id)
    assert failed.value.kind == "execution_interrupted"
    assert "decode" not in server.executed(prompt_id)


def test_freeing_memory_empties_the_cache(server: ComfyServer):
    server.run(workflow(seed=5))
    server.free()
    # the host may take the first prompt before it empties the cache
    assert any("tiny" in graphs.run(server, workflow(seed=seed))[0] for seed in (6, 7))


@pytest.mark.one_host
def test_folder_of_checkpoints_exists_after_the_start():
    with ComfyServer() as server:
        assert list((server.base / "models").iterdir()) == [server.base / "models" / "easyref"]
        assert list((server.base / "models" / "easyref").iterdir()) == []
        assert "could not be created" not in server.log


@pytest.mark.thorough
def test_folder_that_cannot_be_created_is_a_warning():
    with ComfyServer(prepare=lambda base: (base / "models" / "easyref").touch()) as server:
        options = server.object_info()["EasyRefLoader"]["input"]["required"]["checkpoint"][1]["options"]
        assert options == [
            "no file in models/easyref",
            "creatures_easyref.safetensors",
            "tiny_easyref.safetensors",
        ]
        assert f"EasyRef: the folder {server.base / 'models' / 'easyref'} could not be created" in server.log


@pytest.mark.thorough
def test_pack_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "__init__.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(RuntimeError, match="broken on purpose"), ComfyServer(packs={"broken": tmp_path}):
        pass
