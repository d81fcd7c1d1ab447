"""Checks that two processes run together over gloo; tests/test_parallel.py starts them and reads what they found.

python tests/parallel_worker.py RANK FOLDER
"""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmkern import nn as vlmkern_nn
from vlmkern.examples import colours
from vlmkern.models.jina_vlm import JinaVLM
from vlmkern.models.jina_vlm.training import make_optimizer
from vlmkern.parallel import encode_images_tile_parallel, sum_gradients, tensor_parallel

RANKS = 2


def make_model():
    model = JinaVLM.random(colours.tiny_config(), seed=0)
    # the tower's post-norm and last blocks feed nothing
    for name, parameter in model.named_parameters():
        if "post_lnorm" in name:
            parameter.requires_grad_(False)
    return model


def make_batch(size=4):
    return next(colours.make_batches(0, size))


def loss_of(model, inputs, answers):
    logits = model(**inputs)[:, -colours.SQUARES - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_gradients(model, reference):
    for (name, actual), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), name
        if actual.grad is not None:
            torch.testing.assert_close(whole(actual.grad), expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def halves(inputs, answers, rank):
    return {name: value.chunk(RANKS)[rank] for name, value in inputs.items()}, answers.chunk(RANKS)[rank]


def check_ddp(rank, mesh):
    model, reference, batch = make_model(), make_model(), make_batch()
    loss_of(reference, *batch).backward()
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, *halves(*batch, rank)).backward()
    same_gradients(model, reference)


def check_fsdp(rank, mesh):
    model, reference, batch = make_model(), make_model(), make_batch()
    for block in (*model.model.vision_model.layers, *model.model.language_model.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, reference)]
    for _ in range(3):
        expected = loss_of(reference, *batch)
        expected.backward()
        # the mean over ranks of halves of equal size is the mean over the whole
        part = loss_of(model, *halves(*batch, rank))
        part.backward()
        loss = part.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / RANKS, expected.detach(), rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_tensor_parallel(rank, mesh):
    model, reference, (inputs, answers) = make_model(), make_model(), make_batch()
    found = tensor_parallel(model, mesh)
    assert sorted(set(found.values())) == ["heads", "hidden columns"]
    # three blocks of attention and MLP, pooling, projector, two MLPs of the decoder
    assert len(found) == 3 * 2 + 2 + 2, found
    assert list(model.state_dict()) == list(reference.state_dict())
    block = model.model.vision_model.layers[0]
    assert block.attn.qkv_w.weight.to_local().numel() == block.attn.qkv_w.weight.numel() // RANKS
    for (name, actual), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(whole(actual), expected), name
    expected, actual = loss_of(reference, inputs, answers), loss_of(model, inputs, answers)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    actual.backward()
    same_gradients(model, reference)
    with torch.no_grad():
        prompt = inputs | {"input_ids": inputs["input_ids"][:, : -colours.SQUARES]}
        assert torch.equal(model.generate(**prompt, max_new_tokens=4), reference.generate(**prompt, max_new_tokens=4))


def check_tensor_parallel_training(rank, mesh):
    model, reference = make_model(), make_model()
    tensor_parallel(model, mesh)
    losses = [colours.train(each, steps=6) for each in (model, reference)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-3)
    assert make_optimizer(model, 2)[0].param_groups[0]["name"] == "tower"


def check_tensor_parallel_packed(rank, mesh):
    module = vlmkern_nn.TileAttention(24, 2, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
    reference = copy.deepcopy(module)
    tensor_parallel(module, mesh)
    x, residual = torch.linspace(-2, 2, 7 * 24).cos().view(7, 24), torch.ones(7, 24)
    arguments = {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "max_seqlen": 4, "residual": residual}
    torch.testing.assert_close(module(x, **arguments), reference(x, **arguments), rtol=1e-5, atol=1e-5)


def check_tensor_parallel_refuses(rank, mesh):
    module = vlmkern_nn.VisionLanguageConnector(
        24, num_heads=3, head_dim=8, pooled_size=24, mlp_size=16, output_size=8, grid=(4, 4)
    )
    raises(ValueError, "pooling: got 3 heads, expected a multiple of the mesh's size, 2", tensor_parallel, module, mesh)
    # nothing was sharded before the error
    assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
    square = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("a", "b"))
    raises(ValueError, "mesh: got 2 dimensions, expected one", tensor_parallel, module, square)
    raises(TypeError, "mesh: got int", tensor_parallel, module, 2)
    mlp = vlmkern_nn.SwiGLUMLP(8, 12)
    tensor_parallel(mlp, square["b"])
    raises(ValueError, "sharded already", tensor_parallel, mlp, mesh)


def check_tile_parallel(rank, mesh):
    model, (inputs, _) = make_model(), make_batch(3)
    images = (inputs["crops"], inputs["image_masks"], inputs["image_input_idx"])
    with torch.no_grad():
        # nine crops, three, one and none on two ranks; with and without dropped windows
        for batch, tiles in ((3, 3), (1, 3), (1, 1), (0, 3), (3, 0)):
            part = [t[:batch, :tiles] for t in images]
            for arguments in (part, part[:2]):
                expected = model.encode_images(*arguments)
                actual = encode_images_tile_parallel(model, *arguments, mesh=mesh)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
                others = actual.clone()
                dist.broadcast(others, 0)
                assert torch.equal(others, actual)
    raises(
        ValueError, "image_masks: got shape", encode_images_tile_parallel, model, images[0], images[1][:1], mesh=mesh
    )


def check_tile_parallel_training(rank, mesh):
    model, reference, (inputs, answers) = make_model(), make_model(), make_batch(3)
    loss_of(reference, inputs, answers).backward()
    images = [inputs.pop(name) for name in ("crops", "image_masks")]
    features = encode_images_tile_parallel(model, *images, inputs["image_input_idx"], mesh=mesh)
    loss_of(model, inputs | {"image_features": features}, answers).backward()
    sum_gradients(model.model.vision_model.parameters(), mesh)
    same_gradients(model, reference)


def raises(kind, message, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


CHECKS = {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    mesh, found = init_device_mesh("cpu", (RANKS,)), {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check(rank, mesh)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        # written as they come: a check that hangs takes only those after it
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
