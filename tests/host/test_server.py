"""The server that the other tests of this folder talk to does what they rely on."""

import pytest

from devkit.host.server import ComfyServer, PromptFailed, pixels
from devkit.hosts import host_version


def tiny_workflow(seed: int = 1, prompt_tokens: int = 77, steps: int = 2) -> dict:
    return {
        "1": {"class_type": "TinySDXL", "inputs": {"seed": 3, "prompt_tokens": prompt_tokens}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 136, "batch_size": 1}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["1", 1],
                "negative": ["1", 2],
                "latent_image": ["2", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 3]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "tiny"}},
    }


def test_server_is_the_host_under_test(server: ComfyServer):
    assert server.system_stats()["system"]["comfyui_version"] == host_version(server.host)
    assert "TinySDXL" in server.object_info()


def test_workflow_runs_to_a_picture_and_then_comes_from_the_cache(server: ComfyServer):
    first = server.queue(tiny_workflow())
    (png,) = server.images(server.wait(first))
    assert pixels(png).shape == (136, 128, 3)
    assert pixels(png).std() > 1
    assert set(server.executed(first)) == {"1", "2", "3", "4", "5"}

    second = server.queue(tiny_workflow())
    assert server.images(server.wait(second)) == [png]
    assert server.executed(second) == []
    assert server.cached(second) == {"1", "2", "3", "4", "5"}


def test_prompts_of_unequal_length_are_sampled_together(server: ComfyServer):
    (png,) = server.images(server.run(tiny_workflow(prompt_tokens=154)))
    assert pixels(png).std() > 1


def test_refused_prompt_names_the_input(server: ComfyServer):
    with pytest.raises(PromptFailed, match="prompt_tokens") as failed:
        server.queue(tiny_workflow(prompt_tokens=0))
    assert failed.value.kind == "invalid"
    assert "1" in failed.value.details["node_errors"]


def test_failed_prompt_names_the_node(server: ComfyServer):
    (server.base / "input" / "broken.png").write_text("no picture")
    workflow = {
        "8": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
    }
    with pytest.raises(PromptFailed, match="LoadImage") as failed:
        server.run(workflow)
    assert failed.value.kind == "execution_error"
    assert failed.value.details["node_id"] == "8"


def test_interrupt_stops_the_node_that_runs(server: ComfyServer):
    prompt_id = server.queue(tiny_workflow(seed=4, steps=10000))
    server.wait_executing(prompt_id, "3")
    server.interrupt()
    with pytest.raises(PromptFailed) as failed:
        server.wait(prompt_id)
    assert failed.value.kind == "execution_interrupted"
    assert "4" not in server.executed(prompt_id)


def test_freeing_memory_empties_the_cache(server: ComfyServer):
    server.run(tiny_workflow(seed=5))
    server.free()
    executed = []
    for seed in (6, 7):  # the host may take the first prompt before it empties the cache
        prompt_id = server.queue(tiny_workflow(seed=seed))
        server.wait(prompt_id)
        executed += server.executed(prompt_id)
    assert "1" in executed


class WithoutFolder(ComfyServer):
    """A server in whose models folder easyref is a file."""

    def _start(self) -> None:
        (self.base / "models" / "easyref").touch()
        super()._start()


def test_the_folder_of_checkpoints_is_there_after_the_start():
    with ComfyServer() as server:
        assert list((server.base / "models").iterdir()) == [server.base / "models" / "easyref"]
        assert list((server.base / "models" / "easyref").iterdir()) == []
        assert "could not be created" not in server.log


def test_a_folder_that_cannot_be_created_is_no_failure():
    with WithoutFolder() as server:
        options = server.object_info()["EasyRefLoader"]["input"]["required"]["checkpoint"][1]["options"]
        assert options == ["no file in models/easyref", "tiny_easyref.safetensors"]
        assert f"EasyRef: the folder {server.base / 'models' / 'easyref'} could not be created" in server.log


def test_pack_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "__init__.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(RuntimeError, match="broken on purpose"), ComfyServer(packs={"broken": tmp_path}):
        pass
