"""The known layouts of fused layers, measured on the real models rather than read in their code.

Given random outputs of a fused layer, its owner says by its own output what each of them is: v and
up are what it is linear in, k and gate are not; and q acts on its own position alone.
"""

import copy
import functools

import pytest
import torch
from architectures import Architecture, images, tokens

for host in ("torchvision", "open_clip"):
    pytest.importorskip(host, reason=f"{host} is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

import architectures_text  # noqa: E402
import architectures_vision  # noqa: E402
from models import away_from_initialisation  # noqa: E402

import tokengate  # noqa: E402
from tokengate import Slices  # noqa: E402
from tokengate.linears.fused import _RULES, known_slices, place  # noqa: E402
from tokengate.linears.linear_like import is_linear, is_transposed  # noqa: E402
from tokengate.linears.owners import reads_weight  # noqa: E402

# Of the architectures, those that fuse projections in a known way; and more below.
FUSED = [
    "transformers/phi3",
    "transformers/glm4",
    "transformers/glm",
    "transformers/gpt_neox",
    "transformers/codegen",
    "transformers/gpt2",
    "transformers/gpt_bigcode",
    "transformers/bloom",
    "transformers/falcon-7b",
    "transformers/falcon-40b",
    "transformers/mpt",
    "transformers/persimmon",
    "transformers/deepseek_v3",
    "transformers/deepseek_v2",
    "transformers/deepseek_v3-dense",
    "transformers/granitemoeshared-dense",
    "transformers/granitemoehybrid-dense",
    "transformers/deberta-v1",
    "transformers/modernbert",
    "transformers/qwen2_vl-vision",
    "transformers/qwen2_5_vl-vision",
    "transformers/qwen3_vl-vision",
    "transformers/sam-vision",
    "transformers/blip_2-vision",
    "timm/vit_base_patch16_224",
    "timm/deit_tiny_patch16_224",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/deit3_small_patch16_224",
    "timm/vit_small_patch14_reg4_dinov2",
    "timm/vit_base_patch16_siglip_224",
    "timm/vit_small_patch16_18x2_224",
    "timm/vit_relpos_small_patch16_224",
    "timm/vit_dlittle_patch16_reg1_gap_256",
    "timm/vit_pe_core_tiny_patch16_384",
    "timm/vit_base_patch16_xp_224",
    "timm/eva02_tiny_patch14_224",
    "timm/vit_small_patch16_dinov3",
    "timm/vit_small_plus_patch16_dinov3",
    "timm/beit3_base_patch16_224",
    "timm/aimv2_large_patch14_224",
    "timm/samvit_base_patch16_224",
    "timm/naflexvit_base_patch16_gap",
    "timm/swin_tiny_patch4_window7_224",
    "timm/swinv2_cr_tiny_224",
    "timm/hiera_tiny_224",
    "timm/hieradet_small",
    "timm/cait_xxs24_224",
    "timm/convit_tiny",
    "timm/davit_tiny",
    "timm/tiny_vit_5m_224",
    "timm/pvt_v2_b0",
    "timm/twins_svt_small",
    "timm/mvitv2_tiny",
    "timm/nest_tiny",
    "timm/coat_lite_tiny",
    "timm/crossvit_9_240",
    "timm/mobilevit_xxs",
    "timm/caformer_s18",
]
BY_NAME = {one.name: one for one in architectures_text.TEXT + architectures_vision.VISION}
ARCHITECTURES = {name: BY_NAME[name] for name in FUSED}


def more(name, build, run):
    """A variant that fuses in another way, or code that only it runs."""
    ARCHITECTURES[name] = Architecture(name, build, run, ())


def run_cross(model):
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    return model(input_ids=tokens(), encoder_hidden_states=states).logits


def run_image(model):
    return model(images(64))


from_config = architectures_text.from_config
GPT = architectures_text.GPT_SIZES
more("gpt2-cross", from_config("gpt2", sizes=GPT, add_cross_attention=True), run_cross)
more(
    "gpt_bigcode-by-head",
    from_config("gpt_bigcode", sizes=GPT, multi_query=False),
    architectures_text.run_unmasked,
)
more(
    "falcon-by-head",
    from_config("falcon", multi_query=False, new_decoder_architecture=False),
    architectures_text.run_unmasked,
)
more(
    "beit-without-bias",
    lambda: timm.create_model(
        "beit_base_patch16_224", img_size=64, depth=1, embed_dim=64, num_heads=4, qkv_bias=False
    ),
    run_image,
)
for name in ("maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224"):  # by head, and not
    more(name, functools.partial(timm.create_model, name, img_size=64), run_image)
more("twins-deep", lambda: timm.create_model("twins_svt_small", img_size=64), run_image)
more(
    "swinv2-without-bias",
    lambda: architectures_vision.awake(
        timm.create_model(
            "swinv2_tiny_window8_256", img_size=64, embed_dim=24, depths=(1, 1), num_heads=(2, 4),
            qkv_bias=False, window_size=4,
        )
    ),
    run_image,
)  # fmt: skip
more(
    "sam-eager",
    lambda: transformers.models.sam.modeling_sam.SamVisionModel._from_config(
        transformers.SamVisionConfig(**architectures_text.PATCHES, **architectures_text.SAM),
        attn_implementation="eager",
    ),
    architectures_text.run_images,
)


def fused_layers(model):
    """The first layer of each kind, its owner, and how it is divided."""
    found = {}
    for owner in model.modules():
        for attribute, layer in owner.named_children():
            slices = known_slices(owner, attribute) if is_linear(layer) else None
            if slices and not reads_weight(owner, attribute):
                found.setdefault(place(owner, attribute), (owner, layer, slices))
    return found


class Owner:
    """One call of `owner` in `model`, repeated with other outputs of `layer`."""

    def __init__(self, one, model, owner, layer):
        self.owner, self.layer = owner, layer
        calls, outputs = [], []
        hooks = [
            owner.register_forward_pre_hook(
                lambda m, a, k: calls.append(copy.deepcopy((a, k))), with_kwargs=True
            ),
            layer.register_forward_hook(lambda m, a, out: outputs.append(out)),
        ]
        one.run(model)
        for hook in hooks:
            hook.remove()
        self.args, self.kwargs = calls[0]
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(outputs[0].shape, generator=generator)
        self.at_base = self(torch.zeros_like(self.base))

    def __call__(self, change):
        hooks = [self.layer.register_forward_hook(lambda m, a, out: self.base + change)]
        # A norm behind v (BEiT-3, MViTv2) would make the owner nonlinear in it.
        norms = (m for m in self.owner.modules() if "Norm" in type(m).__name__)
        hooks += [norm.register_forward_hook(lambda m, a, out: a[0]) for norm in norms]
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        output = self.owner(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return output[0] if isinstance(output, tuple) else output

    def change(self, slices, name, first_only=False):
        change = torch.zeros_like(self.base)
        parts = slices.take(change, name)
        noise = torch.randn(parts.shape, generator=torch.Generator().manual_seed(1))
        if first_only:
            keep = torch.zeros(parts.shape[:-1], dtype=torch.bool)
            keep.view(-1)[0] = True
            noise = noise * keep.unsqueeze(-1)
        return slices.put(change, {name: noise})

    def curvature(self, slices, name):
        """How far from linear the owner is in this slice, relative to what the slice changes."""
        change = self.change(slices, name)
        once, twice = self(change) - self.at_base, self(2 * change) - self.at_base
        return ((twice - 2 * once).norm() / twice.norm()).item()

    def reach(self, slices, name):
        """At how many positions the output changes with the slice's first position."""
        difference = (self(self.change(slices, name, True)) - self.at_base).abs().amax(-1)
        return int((difference > 1e-6 * self.at_base.abs().max()).sum())


@torch.no_grad()
def check(one, model, owner, layer, slices):
    asked = Owner(one, model, owner, layer)
    curvature = {name: asked.curvature(slices, name) for name in slices.sizes}
    reach = {name: asked.reach(slices, name) for name in slices.sizes}
    for linear, other in (("v", "k"), ("up", "gate")):
        if linear in curvature:
            assert curvature[linear] < 1e-4, f"{linear} is linear"
        if other in curvature:
            assert curvature[other] > 1e-3, f"{other} is not"
    if "q" in reach:
        assert reach["q"] < reach["k"], "q acts on its own position"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_slices_are_what_they_are_called(name):
    one = ARCHITECTURES[name]
    model = one.build().eval().requires_grad_(False)
    fused = fused_layers(model)
    assert fused
    for owner, layer, slices in fused.values():
        check(one, model, owner, layer, slices)


def test_the_check_can_fail():
    """The same number of outputs, named in another order or not by heads."""
    one = ARCHITECTURES["transformers/gpt_neox"]
    model = one.build().eval().requires_grad_(False)
    [(owner, layer, slices)] = fused_layers(model).values()
    for wrong in (
        Slices(groups=4, q=8, v=8, k=8),
        Slices(groups=4, k=8, q=8, v=8),
        Slices(q=32, k=32, v=32),
    ):
        assert wrong.out_features == slices.out_features
        with pytest.raises(AssertionError):
            check(one, model, owner, layer, wrong)


def test_every_rule_has_a_model_that_it_was_measured_on():
    places = {key for one in ARCHITECTURES.values() for key in fused_layers(one.build())}
    assert places == set(_RULES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_slice_is_patched_and_the_others_left_alone(name):
    """All but the last slice of each fused layer, in the real model."""
    one = ARCHITECTURES[name]
    model = one.build().eval().requires_grad_(False)
    names = {layer: n for n, layer in model.named_modules()}
    fused = {layer: slices for _, layer, slices in fused_layers(model).values()}
    targets = [f"{names[m]}.{part}" for m, s in fused.items() for part in list(s.sizes)[:-1]]
    with torch.no_grad():
        base = one.run(model)
    tokengate.patch(model, targets)
    assert sorted(tokengate.layers(model)) == sorted(targets)
    with torch.no_grad():
        assert torch.equal(one.run(model), base), "at first, it changes nothing"

    for layer, slices in fused.items():
        x = torch.randn(2, 3, layer.weight.shape[1 - is_transposed(layer)])
        with tokengate.disabled(model):
            before = layer(x)
        away_from_initialisation(layer, 0.1)
        after = layer(x)
        *patched, last = slices.sizes
        for part in patched:
            assert not torch.equal(slices.take(after, part), slices.take(before, part))
        assert torch.equal(slices.take(after, last), slices.take(before, last))
    changed = one.run(model)
    assert not torch.equal(changed, base)
    changed.float().square().sum().backward()
    for layer_name, layer in tokengate.layers(model).items():
        for parameter in (*layer.modification.parameters(), layer.gate.tau):
            assert parameter.grad is not None, layer_name
    tokengate.unpatch(model)
    with torch.no_grad():
        assert torch.equal(one.run(model), base)
