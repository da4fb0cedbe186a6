"""S as a picture: the inverse of how a host arranges its patches."""

import html_pages
import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_sentence

import tokengate

timm = pytest.importorskip("timm", reason="the timm extra is not installed")

from timm.models.swin_transformer import window_partition  # noqa: E402

from tokengate.integrations.vision import patch_grid, roles  # noqa: E402


def vit(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, img_size=(48, 32), depth=1, embed_dim=32, num_heads=2, **options)


def swin(name="swin_tiny_patch4_window7_224", height=48, width=40, **options):
    options = {"depths": (2,), "num_heads": (2,), "window_size": 4, **options}
    return timm.create_model(name, img_size=(height, width), embed_dim=16, **options)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch16_dinov3", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("beit_base_patch16_224", 1),
        ("vit_relpos_small_patch16_224", 0),
    ],
)
def test_a_plain_one_drops_its_prefix(name, prefix):
    is_open = torch.arange(2 * (prefix + 6)).reshape(2, -1)
    grid = patch_grid(vit(name), is_open)
    assert grid.shape == (2, 3, 2)
    assert torch.equal(grid.flatten(1), is_open[:, prefix:])


@settings(max_examples=many(25), deadline=None)
@given(
    rows=st.integers(5, 12),
    columns=st.integers(5, 12),
    window=st.integers(2, 4),
    kind=st.sampled_from(["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]),
)
def test_windows_are_put_back(rows, columns, window, kind):
    """Also shifted ones, and those that reach over the edge."""
    model = swin(kind, 4 * rows, 4 * columns, window_size=window)
    grid = torch.arange(2 * rows * columns).reshape(2, rows, columns)
    for index, block in enumerate(model.layers[0].blocks):
        assert any(block.shift_size) == (index == 1)
        high, wide = block.window_size
        shifted = grid.roll([-s for s in block.shift_size], (1, 2))
        padded = torch.nn.functional.pad(shifted, (0, -columns % wide, 0, -rows % high), value=-1)
        windows = window_partition(padded.unsqueeze(-1), block.window_size)
        name = f"layers.0.blocks.{index}.attn.proj"
        assert torch.equal(patch_grid(model, windows.reshape(-1, high * wide), name), grid)
        name = f"layers.0.blocks.{index}.mlp.fc1"
        assert torch.equal(patch_grid(model, grid.flatten(1), name), grid)


@pytest.mark.parametrize("index", [0, 1])
def test_the_patch_that_differs_is_where_it_is(index):
    """In a Swin's plain and in its shifted block, on features that are zero but at one patch."""
    model = swin().eval()
    name = f"layers.0.blocks.{index}.attn.qkv"
    tokengate.patch(model, [name], tau=1e6)
    features = torch.zeros(1, 12, 10, 16)
    features[0, 7, 3] = 1.0
    with tokengate.record(model, positions=True) as rec, torch.no_grad():
        model.layers[0].blocks[index]._attn(features)
    # tau closes what it can: where W0 x is 0, nothing is below tau times its norm.
    grid = patch_grid(model, rec.positions[name][0], name)
    assert (~grid).nonzero().tolist() == [[0, 7, 3]]


def test_of_a_run_all_layers_give_pictures():
    model = swin(depths=(2, 2), num_heads=(2, 2)).eval()
    tokengate.patch(model, roles(model, "q", "k", "v", "proj", "fc1", "fc2"))
    with tokengate.record(model, positions=True) as rec, torch.no_grad():
        model(torch.randn(3, 3, 48, 40))
    assert len(rec.positions) == 16
    grids = {}
    for name, (is_open,) in rec.positions.items():
        grid = patch_grid(model, is_open, name)
        assert grid.shape == ((3, 12, 10) if name.startswith("layers.0") else (3, 6, 5))
        assert grid.all()
        grids[name] = grid[0]
    view = tokengate.PatchView(html_pages.PNG, grids)
    assert '"rows":12,"columns":10' in rec.report().to_html(images=[view])


def test_refused():
    def refused(says, *arguments):
        with pytest.raises(tokengate.TokenGateError, match=says):
            patch_grid(*arguments)

    ones = torch.ones(2, 7, dtype=torch.bool)
    assert patch_grid(vit(), ones).all()
    refused(r"given \(2, 6\), but a layer in the blocks .* sees \(B, 7\)", vit(), ones[:, 1:])
    refused(r"given \(7,\)", vit(), ones[0])
    for name in ("blocks.0.attn.proj", "blocks.0.attn.qkv.q"):  # a slice of what is not patched
        assert patch_grid(vit(), ones, name).all()
    for layer in ("backbone.blocks.0.attn.proj", "blocks.0", vit().blocks[0].attn.proj):
        with one_sentence("layer=", "no layer of this VisionTransformer", "leave it out"):
            patch_grid(vit(), ones, layer)
    hiera = timm.create_model("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1))
    refused("knows plain vision transformers of timm and its Swins, not a Hiera", hiera, ones)
    name = "layers.0.blocks.1.attn.qkv"
    windows = torch.ones(2 * 9, 16, dtype=torch.bool)
    assert patch_grid(swin(), windows, name).shape == (2, 12, 10)
    refused("layer=None is in no block of this SwinTransformer", swin(), windows)
    refused("layer='head' is in no block", swin(), windows, "head")
    refused(r"sees \(B \* 9, 16\)", swin(), windows[:17], name)
    refused(r"sees \(B \* 1, 120\)", swin(), windows, "layers.0.blocks.1.mlp.fc1")
