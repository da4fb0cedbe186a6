"""sentence-transformers calls `self.model.forward(...)`, which no hook of the model sees."""

import pytest
import torch
from models import away_from_initialisation

import tokengate
from tokengate.errors import UnreachedLayerWarning

pytest.importorskip("sentence_transformers", reason="the test extra is not installed")

SENTENCES = ["a", "a b c", "a b c d e f g", "d e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    made = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
    (made / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(made / "vocab.txt")).save_pretrained(made)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(made)
    return str(made)


def sentence_model(folder):
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(folder)
    return SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")


def positions(model, call):
    with tokengate.record(model) as rec:
        call()
    (counted,) = {module.positions for module in rec.report().modules.values()}
    return counted


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_padding_counts_in_nothing(folder):
    model = sentence_model(folder)
    # The whole, or the model inside of it alone, to which its own class of modules hands on.
    for part in (model, model[0].auto_model):
        tokengate.patch(part, ["query", "output.dense"], rank=2, penalty=1e-3)
        away_from_initialisation(part)
        features = model.tokenize(SENTENCES)
        real = int(features["attention_mask"].sum())
        assert (real, features["attention_mask"].numel()) == (21, 36)
        assert positions(part, lambda: model.encode(SENTENCES)) == real
        assert positions(part, lambda features=features: model(features)) == real

        def taus(batch, part=part):
            part.zero_grad()
            for each in batch:
                model(model.tokenize(each))["sentence_embedding"].sin().sum().backward()
            return [layer.gate.tau.grad.item() for layer in tokengate.layers(part).values()]

        model.eval()
        # One by one there is no padding.
        assert taus([SENTENCES]) == pytest.approx(taus([[each] for each in SENTENCES]), abs=1e-6)
        kinds = [type(module) for module in tokengate.unpatch(part).modules()]
        assert not any(hasattr(kind, "_own_class") for kind in kinds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_unreached_layer_is_named(folder):
    model = sentence_model(folder)
    inner = tokengate.patch(model[0].auto_model, ["query", "pooler.dense"], rank=2)
    attention = inner.encoder.layer[1].attention.self
    attention.forward = lambda states, *args, **options: (states, None)
    with pytest.warns(UnreachedLayerWarning, match=r"'encoder\.layer\.1\.attention\.self\.query'"):
        model.encode(SENTENCES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loss_that_caches_embeddings_is_led(folder):
    """It embeds once more in backward, and there alone with gradients."""
    from sentence_transformers import losses

    def seen(loss, **options):
        model = sentence_model(folder)
        torch.manual_seed(0)
        tokengate.patch(model, ["query", "output.dense"], rank=2)
        away_from_initialisation(model).eval()
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
        schedule = tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=1)
        features = [model.tokenize(SENTENCES), model.tokenize(SENTENCES[::-1])]
        loss(model, **options)(features, None).backward()
        optimizer.step()
        return schedule.thresholds

    at_once = seen(losses.MultipleNegativesRankingLoss)
    assert min(at_once.values()) > 0
    cached = seen(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=4)
    assert cached == pytest.approx(at_once, rel=1e-3)
