"""Words into vectors: T5 as transformers has it, tokenizers by their files, captions cleaned as in diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_fixtures import assert_same
from pipeline_fixtures import in_process

from ard_jax.convert import t5_from_transformers, t5_to_transformers
from ard_jax.convert.t5 import t5_model
from ard_jax.errors import UserError
from ard_jax.models import count_parameters, parameter_shapes
from ard_jax.text import T5Encoder, clean_caption, open_tokenizer
from ard_jax.text.t5 import distance_buckets
from ard_jax.text_encoders import open_text_encoder, pad_tokens
from ard_jax.weights.tensors import write_tensors

TINY = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 3,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
TEXTS = [
    "",
    "a red apple",
    "A Red APPLE!",
    "  two   spaces  ",
    "woman swimming medium skin tone",
    "naïve café, crème brûlée",
    "ﬁne ½ ① Ｆｕｌｌ width",
    "line\nbreak\tand tab",
    "你好 world",
    "1234567890",
    "don't stop-me_now (please) [x] {y}",
    "emoji 🍎 here",
    "a</s>b",
    "<pad> as words",
    "UPPER lower MiXeD",
    "...",
    "x" * 60,
    "the quick brown fox jumps over the lazy dog " * 6,
    " ",
    "é",
]


def random_t5(seed=0, **changes):
    """A state dict of transformers' with their names and shapes, random everywhere, and its config."""
    config = TINY | changes
    model = t5_model(config)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    leaves, tree = jax.tree.flatten(parameter_shapes(model, ids, ids))
    random = np.random.default_rng(seed)
    params = tree.unflatten([0.4 * random.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])
    return t5_to_transformers(model, params), config


def oracle(state_dict, config, dtype="float32"):
    import torch
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**config)).eval()
    missing = model.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"encoder.embed_tokens.weight"}
    return model.to(getattr(torch, dtype))


def run_oracle(model, ids, mask):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()


def some_ids(length):
    random = np.random.default_rng(1)
    ids = random.integers(2, 40, size=(3, length))
    return ids, (np.arange(length) < np.array([[1], [length], [max(1, length // 2)]])).astype(np.int64)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------------- T5


@pytest.mark.oracle
@pytest.mark.parametrize("length", [1, 9, 200])
def test_float32(length):
    state_dict, config = random_t5()
    model, params = t5_from_transformers(state_dict, config)
    ids, mask = some_ids(length)
    ours = model.apply({"params": params}, ids, mask)
    assert relative_error(ours, run_oracle(oracle(state_dict, config), ids, mask)) < 2e-5


@pytest.mark.oracle
def test_float64(x64, monkeypatch):
    """transformers takes norms and softmax in float32 whatever the model's type is; here it is kept from that."""
    import torch
    from transformers.models.t5 import modeling_t5

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim=dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double() if x.is_floating_point() else x.to(torch.float32))
    state_dict, config = random_t5()
    wide = {name: array.astype(np.float64) for name, array in state_dict.items()}
    model, params = t5_from_transformers(wide, config)
    ids, mask = some_ids(150)
    theirs = oracle(state_dict, config | {"attn_implementation": "eager"}, "float64")
    ours = model.apply({"params": params}, ids, mask)
    assert ours.dtype == np.float64
    assert relative_error(ours, run_oracle(theirs, ids, mask)) < 1e-10


@pytest.mark.oracle
def test_distances_are_those_of_transformers():
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(700)
    for buckets, longest in ((32, 128), (16, 64)):
        expected = T5Attention._relative_position_bucket(
            positions[None] - positions[:, None], bidirectional=True, num_buckets=buckets, max_distance=longest
        )
        np.testing.assert_array_equal(distance_buckets(700, buckets, longest), expected)


def test_there_and_back():
    state_dict, config = random_t5()
    model, params = t5_from_transformers(state_dict, config)
    assert_same(t5_to_transformers(model, params), state_dict)
    # a whole T5's decoder and the encoder's own copy of the embedding are left out; the copy alone will do
    whole = state_dict | {"decoder.x": np.zeros(1), "lm_head.weight": np.zeros((40, 24))}
    whole["encoder.embed_tokens.weight"] = whole["shared.weight"]
    jax.tree.map(np.testing.assert_array_equal, t5_from_transformers(whole, config)[1], params)
    del whole["shared.weight"]
    jax.tree.map(np.testing.assert_array_equal, t5_from_transformers(whole, config)[1], params)


def test_names_are_those_of_transformers():
    state_dict, _ = random_t5()
    assert state_dict["shared.weight"].shape == (40, 24)
    first = "encoder.block.0.layer.0.SelfAttention."
    assert state_dict[f"{first}relative_attention_bias.weight"].shape == (32, 3)
    assert state_dict[f"{first}q.weight"].shape == (18, 24) and state_dict[f"{first}o.weight"].shape == (24, 18)
    assert state_dict["encoder.block.2.layer.1.DenseReluDense.wi_1.weight"].shape == (20, 24)
    assert state_dict["encoder.block.2.layer.1.DenseReluDense.wo.weight"].shape == (24, 20)
    assert state_dict["encoder.block.1.layer.1.layer_norm.weight"].shape == (24,)
    assert len(state_dict) == 3 + 3 * 9


def test_padding_of_the_empty_text_is_one_vector_and_changes_no_other():
    state_dict, config = random_t5()
    model, params = t5_from_transformers(state_dict, config)
    ids, mask = some_ids(20)
    ids = ids * mask
    out = model.apply({"params": params}, ids, mask)
    np.testing.assert_allclose(out[0, 2:], np.broadcast_to(out[0, 1], (18, 24)), rtol=0, atol=1e-5)
    longer = model.apply({"params": params}, np.pad(ids, ((0, 0), (0, 12))), np.pad(mask, ((0, 0), (0, 12))))
    np.testing.assert_allclose(longer[1, :20], out[1], rtol=0, atol=1e-5)


def test_parameters_of_the_xxl():
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    assert count_parameters(parameter_shapes(T5Encoder(), ids, ids)) == 4_762_310_656


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "clip_text_model"}, "a 'clip_text_model', but only a T5 v1.1"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu', but only 'gated-gelu'"),
        ({"d_ff": "20"}, "d_ff is '20' in its config"),
        ({"num_layers": 4}, "missing: .*block.3"),
        ({"num_layers": 2}, "unexpected: .*block.2"),
        ({"d_model": 30}, "of another shape: .*instead of"),
    ],
)
def test_another_text_encoder_is_refused(change, said):
    state_dict, config = random_t5()
    with pytest.raises(UserError, match=said):
        t5_from_transformers(state_dict, config | change)


def test_float16_is_refused():
    state_dict, config = random_t5()
    half = state_dict | {"shared.weight": state_dict["shared.weight"].astype(np.float16)}
    with pytest.raises(UserError, match=r"float16 \(shared.weight and others\), in which it overflows"):
        t5_from_transformers(half, config)
    with pytest.raises(UserError, match="dtype is float16, in which T5 overflows"):
        t5_model(config, dtype=jnp.float16)


ON_A_MESH = """
import json
import pathlib
import sys

import jax
import numpy as np

from ard_jax.parallel import make_mesh
from ard_jax.text_encoders import open_text_encoder

mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 3})
alone, shared = (open_text_encoder(FOLDER, 12, "none", mesh=given) for given in (None, mesh))
texts = ["red apple", "two a", "", "a"]
params = shared.params
print(json.dumps({
    "apart": max(float(np.abs(a - b).max()) for a, b in zip(alone.encode(texts), shared.encode(texts))),
    "query": tuple(params["blocks"]["query"]["kernel"].sharding.spec),
    "mlp_out": tuple(params["blocks"]["mlp_out"]["kernel"].sharding.spec),
    "embedding": params["token_embed"]["embedding"].addressable_shards[0].data.shape,
}))
"""


@pytest.mark.slow
def test_t5_lies_on_a_mesh_by_the_rules_of_a_teacher(tmp_path):
    """Six devices share each matrix, and the vectors are the same."""
    encoder(tmp_path, d_ff=21)
    found = in_process(f"FOLDER = {str(tmp_path)!r}\n{ON_A_MESH}", devices=6)
    assert found["apart"] < 2e-5
    assert found["query"] == [None, "fsdp", "tensor"] and found["mlp_out"] == [None, "tensor", "fsdp"]
    assert found["embedding"] == [40, 12]


# -------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A small sentencepiece model as T5's: pad 0, end 1, unknown 2."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "text").write_text("\n".join(" ".join(TEXTS[1:12]).split() * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=80, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    return folder / "spiece.model"


def json_tokenizer(path, words=("red", "apple", "a", "two")):
    """A tokenizer.json of whole words, with a beginning and an end."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "<s>", *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    tokenizer.enable_padding(length=30)  # as some files have it; ours are ragged
    tokenizer.save(str(path))
    return path


@pytest.mark.oracle
def test_ids_are_those_of_transformers(spiece, tmp_path):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    theirs = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    ours = open_tokenizer(tmp_path)
    assert len(TEXTS) == 20
    for length in (16, 300):
        found, cut = ours.encode(TEXTS, length)
        expected = theirs(TEXTS, truncation=True, max_length=length)["input_ids"]
        assert [row.tolist() for row in found] == expected
        assert cut == sum(len(row) > length for row in theirs(TEXTS)["input_ids"])


def test_a_sentencepiece_model_cuts_and_ends(spiece):
    tokenizer = open_tokenizer(spiece)
    found, cut = tokenizer.encode(TEXTS, 8)
    whole, none = tokenizer.encode(TEXTS, 1000)
    assert found[0].tolist() == [1] and all(len(row) <= 8 and row[-1] == 1 for row in found)
    assert cut == sum(len(row) > 8 for row in whole) > 0 == none
    assert all(row[:-1].tolist() == full[: len(row) - 1].tolist() for row, full in zip(found, whole, strict=True))
    assert max(row.max() for row in whole) < tokenizer.vocabulary


def test_a_tokenizer_json_says_itself_what_stands_around_a_text(tmp_path):
    tokenizer = open_tokenizer(json_tokenizer(tmp_path / "tokenizer.json"))
    found, cut = tokenizer.encode(["", "red apple", "a a a a a", "pear"], 5)
    assert [row.tolist() for row in found] == [[3, 1], [3, 4, 5, 1], [3, 6, 6, 6, 1], [3, 2, 1]]
    assert cut == 1 and tokenizer.vocabulary == 8


def test_a_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer: give a folder with one of spiece.model"):
        open_tokenizer(tmp_path)
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\x00no")
        with pytest.raises(UserError, match=f"{name} cannot be read as a"):
            open_tokenizer(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- cleaning

MESSY = [
    "  A Red APPLE ",
    "see https://example.com/a?b=c and www.site.org now",
    "<p>bold <b>tag</b></p> &amp; &quot;quoted&quot;",
    "by @artist #123 #123456 1234567",
    "photo_of_a_cat_on_a_mat.jpg image",
    "this-is-my-cute-cat-picture",
    "192.168.0.1 at 5:30 ",
    "«quote» ‘single’ `tick` — dash – en",
    "***SALE*** free shipping worldwide shipping download free",
    "jc6640 jc6640vc 6640vc231 j2d1a2a 10x20 3.5х7",
    "你好 ㊗ a cup of tea",
    "click on here page 12 png images",
    "'all in quotes'",
    "a,b.c/d : e",
    "ends with comma,",
    '""double""..dots . x',
    "%E2%82%AC+100+percent",
    "<person> on a bike",
    "schÃ¶n mojibake",
    ".hidden",
]


@pytest.mark.oracle
def test_cleaning_is_that_of_diffusers():
    from diffusers import PixArtAlphaPipeline

    pytest.importorskip("ftfy")
    pipe = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
    for texts in (MESSY, TEXTS):
        assert [clean_caption(text, "clean") for text in texts] == pipe._text_preprocessing(texts, clean_caption=True)
        assert [clean_caption(text, "lower") for text in texts] == pipe._text_preprocessing(texts)
    assert clean_caption(" A ", "none") == " A "
    with pytest.raises(UserError, match="cleaning is 'twice': choose one of none, lower, clean"):
        clean_caption("a", "twice")


# ---------------------------------------------------------------------------------------------------------- encoders


def encoder(folder, **changes):
    """A T5's folder, its tokenizer in it."""
    state_dict, config = random_t5(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", state_dict)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["T5EncoderModel"]}))
    json_tokenizer(folder / "tokenizer.json")
    return folder


def test_a_text_s_vectors_do_not_depend_on_its_neighbours(tmp_path):
    opened = open_text_encoder(str(encoder(tmp_path)), 40, "lower")
    texts = ["Red apple", "two " * 30, "", "a"]
    together = opened.encode(texts)
    assert [len(row) for row in together] == [4, 32, 2, 3] and opened.width == 24
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(opened.encode([text])[0], row, rtol=0, atol=1e-5)
    np.testing.assert_allclose(opened.null()[:2], together[2], rtol=0, atol=1e-5)


def test_the_empty_text_and_what_pads_it(tmp_path, spiece):
    """T5's own: the end, and one vector for all padding, at whatever length."""
    encoder(tmp_path, vocab_size=100)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    opened = open_text_encoder(str(tmp_path), 40, "none")
    padded, mask = pad_tokens([np.array([1]), np.arange(1, 20)], 40)
    assert padded.shape == mask.shape == (2, 32) and mask.sum(axis=1).tolist() == [1, 19]
    vectors = opened.vectors(padded, mask)[0]
    end, padding = opened.null()
    np.testing.assert_allclose(vectors, [end, *[padding] * 31], rtol=0, atol=1e-5)
    assert np.abs(end - padding).max() > 0.1


def test_a_pipeline_s_folder_with_shards(tmp_path):
    part = encoder(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    (tmp_path / "tokenizer").mkdir()
    (part / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
    state_dict, _ = random_t5()
    whole = open_text_encoder(str(tmp_path), 10, "none")
    (part / "model.safetensors").unlink()
    names = sorted(state_dict)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    for file, own in shards.items():
        write_tensors(part / file, {name: state_dict[name] for name in own})
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    again = open_text_encoder(str(tmp_path), 10, "none")
    np.testing.assert_array_equal(whole.encode(["red apple"])[0], again.encode(["red apple"])[0])
    assert whole.sha256 != again.sha256  # of files, which differ


def test_what_an_encoder_is_depends_on_how_texts_are_read(tmp_path):
    folder = str(encoder(tmp_path))
    hashes = {open_text_encoder(folder, *how).sha256 for how in ((10, "none"), (11, "none"), (10, "lower"))}
    assert len(hashes) == 3 and open_text_encoder(folder, 10, "none").sha256 in hashes


def test_half_a_character_is_said(tmp_path):
    opened = open_text_encoder(str(encoder(tmp_path)), 10, "none")
    with pytest.raises(UserError, match=r"the text 'a red \\udc00 apple' has '\\udc00' in it, which is half a char"):
        opened.tokenize(["a red apple", "a red \udc00 apple"])


def test_bad_encoders(tmp_path):
    with pytest.raises(UserError, match="'nowhere' is not there: give 'wordllama', or the folder"):
        open_text_encoder("nowhere", 10, "none")
    with pytest.raises(
        UserError, match="^captions.encoder is '': give wordllama, the folder of a pipeline or a T5, or"
    ):
        open_text_encoder("", 10, "none")
    with pytest.raises(UserError, match="length is 1: a text has at least 2 tokens"):
        open_text_encoder("wordllama", 1, "none")
    with pytest.raises(UserError, match="cleaning is 'x'"):
        open_text_encoder("wordllama", 10, "x")
    folder = encoder(tmp_path, vocab_size=7)
    with pytest.raises(UserError, match="tokenizer.json has 8 tokens, but .* has vectors of 7: give the tokenizer"):
        open_text_encoder(str(folder), 10, "none")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        open_text_encoder(str(folder), 10, "none")


def test_word_vectors_that_a_package_ships():
    pytest.importorskip("wordllama")
    opened = open_text_encoder("wordllama", 32, "none")
    red, swapped, empty = opened.encode(["red apple", "apple red", ""])
    assert opened.width == 256 and red.shape == (3, 256) and empty.shape == (1, 256)
    assert np.abs(red[1] - swapped[2]).max() > 0.1  # one word at two places
    again = open_text_encoder("wordllama", 32, "none")
    np.testing.assert_array_equal(again.encode(["red apple"])[0], red)
    assert again.sha256 == opened.sha256
    assert opened.null().shape == (2, 256) and (opened.null()[1] == 0).all()
