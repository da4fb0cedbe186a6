"""A patched model that is saved whole, and folders of adapters in the hands of transformers."""

import copy
import gc
import inspect
import json
import pickle
import weakref

import pytest
import torch

import tokengate
from tokengate import TokenGateError
from tokengate.errors import SavedWithBaseWarning

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokengate.patch(model, ["q_proj", "v_proj"], rank=2)
    torch.manual_seed(1)
    for layer in tokengate.layers(model).values():
        torch.nn.init.normal_(layer.modification.B)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def read(folder):
    """What `from_pretrained` makes of a folder; it logs the keys that it leaves out."""
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def test_reading_what_a_patched_model_wrote_gives_the_base_and_that_is_said(folder, tmp_path):
    model, base = trained(folder), read(folder)
    with pytest.warns(
        SavedWithBaseWarning, match=r"4 patched layers.*gives the base.*tokengate\.save"
    ):
        model.save_pretrained(tmp_path)
    assert (logits(model) - logits(base)).abs().max() > 0.5
    assert torch.equal(logits(read(tmp_path)), logits(base))
    tokengate.save(model, tmp_path / "adapter")
    tokengate.load(base, tmp_path / "adapter")
    assert torch.equal(logits(base), logits(model))


def test_after_a_partial_fold_it_is_a_mixture_and_that_is_said(folder, tmp_path):
    model, base = trained(folder), read(folder)
    patched = tokengate.layers(model)
    patched["model.layers.0.self_attn.q_proj"].gate.tau.data.fill_(0.5)  # open here, closed there
    full = logits(model)
    folding = tokengate.fold(model, [{"input_ids": IDS}])
    assert folding.names("merged")
    assert folding.names("kept")
    torch.testing.assert_close(logits(model), full, rtol=1e-3, atol=1e-3)
    with pytest.warns(SavedWithBaseWarning, match=r"1 patched layers.*mixture.*3 layers"):
        model.save_pretrained(tmp_path)
    found = logits(read(tmp_path))
    assert (found - full).abs().max() > 0.1
    assert (found - logits(base)).abs().max() > 0.1


def test_what_is_folded_as_a_whole_is_saved_in_silence_and_right(folder, tmp_path):
    model = trained(folder)
    tokengate.fold(model, [{"input_ids": IDS}])
    assert not tokengate.layers(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(read(tmp_path)), logits(model))


def test_copies_warn_and_plain_models_do_not(folder, tmp_path):
    model = trained(folder)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "save_directory" in inspect.signature(each.save_pretrained).parameters
        with torch.no_grad():
            each.lm_head.weight.fill_(7)
        with pytest.warns(SavedWithBaseWarning) as caught:
            each.save_pretrained(tmp_path)
        assert [caught[0].filename, len(caught)] == [__file__, 1]
        assert (read(tmp_path).lm_head.weight == 7).all()  # its own, and not another's
        with torch.no_grad():
            each.lm_head.weight.fill_(0)
    read(folder).save_pretrained(tmp_path)
    tokengate.unpatch(model)
    model.save_pretrained(tmp_path)


def test_a_model_that_is_dropped_is_freed_at_once(folder):
    model = trained(folder)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_trainers_checkpoint_is_read_into_the_patched_model(folder, tmp_path):
    trained(folder).save_pretrained(tmp_path / "checkpoint-12")
    with pytest.warns(SavedWithBaseWarning):
        trained(folder).save_pretrained(tmp_path / "checkpoints")


def test_what_saves_a_part_that_is_patched_warns_once(folder, tmp_path):
    class Whole(torch.nn.Module):
        """As sentence-transformers', which saves its parts in their own way."""

        def __init__(self):
            super().__init__()
            self.inner = read(folder)

        def save_pretrained(self, path):
            self.inner.save_pretrained(path)

    model = tokengate.patch(Whole(), ["q_proj"])
    with pytest.warns(SavedWithBaseWarning) as caught:
        model.save_pretrained(tmp_path)
    assert [str(each.message).split(".")[0] for each in caught] == ["Whole"]
    tokengate.unpatch(model)
    tokengate.patch(model.inner, ["q_proj"])
    for each in (model, model.inner):
        with pytest.warns(SavedWithBaseWarning, match=type(each).__name__):
            each.save_pretrained(tmp_path)


def test_sentence_transformers_and_diffusers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="of the test extra")
    diffusers = pytest.importorskip("diffusers", reason="of the test extra")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    words = tmp_path / "bert" / "vocab.txt"
    words.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")
    transformers.BertTokenizer(str(words)).save_pretrained(tmp_path / "bert")
    sentences = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    tokengate.patch(sentences, ["query"])
    for save in (sentences.save, sentences.save_pretrained):
        with pytest.warns(SavedWithBaseWarning) as caught:
            save(str(tmp_path / "sentences"))
        assert len(caught) == 1
    with pytest.raises(TokenGateError, match=r"holds a model \('model\.safetensors'\)"):
        tokengate.save(sentences, tmp_path / "sentences")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    tokengate.patch(pipe.unet, ["to_q"])
    with pytest.warns(SavedWithBaseWarning, match="UNet2DModel"):
        pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(TokenGateError, match=r"diffusion_pytorch_model\.safetensors"):
        tokengate.save(pipe.unet, tmp_path / "pipe" / "unet")


def test_transformers_says_honestly_that_an_adapter_is_no_model(folder, tmp_path):
    tokengate.save(trained(folder), tmp_path)
    for ask in (
        lambda: transformers.AutoModel.from_pretrained(tmp_path),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)),
        lambda: transformers.pipeline("text-generation", model=str(tmp_path)),
    ):
        with pytest.raises((OSError, ValueError), match=r"config\.json|model_type|Unrecognized"):
            ask()


def test_a_model_beside_an_adapter_is_still_read(folder, tmp_path):
    """Whoever puts a base into an adapter's folder; `save` does not do the reverse."""
    base = read(folder)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(TokenGateError, match=r"holds a model \('model\.safetensors'\)"):
        tokengate.save(trained(folder), tmp_path / "base")
    assert not (tmp_path / "base" / "tokengate_config.json").exists()
    tokengate.save(trained(folder), tmp_path / "adapter")
    base.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(read(tmp_path / "adapter")), logits(base))
    tokengate.load(base, tmp_path / "adapter")
    assert torch.equal(logits(base), logits(trained(folder)))


def test_the_base_is_kept(folder, tmp_path):
    model = trained(folder)
    model.config._name_or_path, model.config._commit_hash = "some/llama", "0123abc"
    tokengate.save(model, tmp_path)
    config = json.loads((tmp_path / "tokengate_config.json").read_text())
    assert (config["base_id"], config["base_revision"]) == ("some/llama", "0123abc")
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "some/llama"' in card
    assert "LlamaForCausalLM.from_pretrained('some/llama', revision='0123abc')" in card
