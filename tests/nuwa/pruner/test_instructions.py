"""Published instruction data: the tokens are LLaVA's, the loss is the stock model's, damage is one clear line."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from instruction_data import ENTRIES, TEMPLATE, tiny_llava, write_data
from PIL import Image

from nuwa.pruner import instructions as module
from nuwa.pruner.conversations import draw_subset
from nuwa.pruner.instructions import (
    Conversations,
    InstructionDataError,
    encode_turns,
    pack_conversation,
    read_instructions,
)
from nuwa.pruner.train import build_learner, evaluator, train_pruner
from nuwa.stage1.learnpruner import Lpm, read_lpm
from nuwa.testbed.instruction import IGNORE
from nuwa.training import PhaseSchedule, step_rng

torch.set_num_threads(1)
TOKENS = 36
WITH_IMAGE = [number for number, one in enumerate(ENTRIES) if "image" in one]


@pytest.fixture(scope="module")
def vlm():
    """The stock model: nothing here gives it to a learner."""
    return tiny_llava()


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def read(path, share=1.0, seed=0):
    return read_instructions(path, path.parent, seed, share)


def as_llava_writes(number: int) -> tuple[str, list[tuple[int, int]]]:
    """The conversation of an entry as the text LLaVA was trained on, and where its answers and their end tokens are."""
    text, spans = "", []
    for at, turn in enumerate(ENTRIES[number]["conversations"]):
        said = turn["value"].replace("<image>", "").strip()
        if at % 2:
            text += " ASSISTANT:"
            begin = len(text)
            text += f" {said}</s>" if said else "</s>"
            spans.append((begin, len(text)))
        else:
            text += f"USER: <image>\n{said}" if at == 0 else f"USER: {said}"
    return text, spans


def stock_inputs(vlm, number: int, folder) -> dict[str, torch.Tensor]:
    """What a stock model is given for an entry, its labels from the answers' places in the text."""
    text, spans = as_llava_writes(number)
    image = Image.open(folder / ENTRIES[number]["image"])
    inputs = dict(vlm.processor(images=[image], text=[text], return_tensors="pt"))
    unexpanded = vlm.processor.tokenizer(text, return_offsets_mapping=True)
    labels = []
    for token, (_, end) in zip(unexpanded.input_ids, unexpanded.offset_mapping, strict=True):
        answered = any(begin < end <= stop for begin, stop in spans)
        copies = TOKENS if token == vlm.image_token else 1
        labels += [token if answered else IGNORE] * copies
    return inputs | {"labels": torch.tensor([labels])}


# --- tokens


def test_the_prompt_up_to_the_first_answer_is_the_adapters_own(vlm, data):
    found = read(data)
    for row, number in enumerate(WITH_IMAGE):
        turns = found.conversation(row).turns
        prompt = vlm.encode_prompt(turns[0][0])
        expected = [*prompt.before, *[vlm.image_token] * TOKENS, *prompt.after]
        packed = pack_conversation(vlm, turns, 10_000)
        assert packed.input_ids[: len(expected)].tolist() == expected, number
        labelled = np.flatnonzero(packed.labels != IGNORE)
        assert labelled[0] == len(expected) - 1, "the prompt's last token predicts the answer's first"


def test_all_turns_are_the_tokens_of_llavas_own_text_and_all_answers_are_labels(vlm, data):
    found = read(data)
    for row, number in enumerate(WITH_IMAGE):
        packed = pack_conversation(vlm, found.conversation(row).turns, 10_000)
        stock = stock_inputs(vlm, number, data.parent)
        assert packed.input_ids.tolist() == stock["input_ids"][0].tolist(), number
        assert packed.labels[:-1].tolist() == stock["labels"][0, 1:].tolist(), number
        assert packed.labels[-1] == IGNORE
        ends = (packed.labels == vlm.end_tokens[0]).sum()
        assert ends == len(ENTRIES[number]["conversations"]) // 2, "every answer ends"
        assert packed.position_ids.tolist() == list(range(len(packed.input_ids)))


def test_an_end_token_of_the_template_is_not_doubled(vlm, data):
    ending = TEMPLATE.replace(
        "{{ part['text'] }} ", "{{ part['text'] }}{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    )
    assert ending != TEMPLATE
    turns = read(data).conversation(1).turns
    assert list(encode_turns(tiny_llava(ending), turns)) == list(encode_turns(vlm, turns))


def test_a_template_that_says_a_system_prompt_once_says_it_once():
    turns = [("How many?", "Two"), ("Where?", "left")]
    first, second = encode_turns(tiny_llava("You see. " + TEMPLATE), turns)
    plain_first, plain_second = encode_turns(tiny_llava(), turns)
    assert len(first[0]) > len(plain_first[0]) and first[1] == plain_first[1]
    assert second == plain_second


def test_a_template_that_rewrites_what_was_said_is_refused():
    forgetful = "{% set messages = messages[-2:] %}" + TEMPLATE
    with pytest.raises(InstructionDataError) as caught:
        list(encode_turns(tiny_llava(forgetful), [("a?", "b"), ("c?", "d")]))
    assert str(caught.value) == "the model's chat template changes earlier turns when one is added"


def test_too_long_conversations_lose_their_last_turns_or_are_passed_over(vlm, data):
    turns = read(data).conversation(1).turns
    whole = pack_conversation(vlm, turns, 10_000)
    lengths = [len(pack_conversation(vlm, turns[:count], 10_000).input_ids) for count in (1, 2, 3)]
    assert lengths == sorted(set(lengths)) and lengths[-1] == len(whole.input_ids)
    for limit in range(lengths[0] - 2, lengths[-1] + 2):
        packed = pack_conversation(vlm, turns, limit)
        fitting = [length for length in lengths if length <= limit]
        if not fitting:
            assert packed is None
            continue
        assert len(packed.input_ids) == fitting[-1]
        assert packed.input_ids.tolist() == whole.input_ids[: fitting[-1]].tolist()
        assert packed.labels[:-1].tolist() == whole.labels[: fitting[-1] - 1].tolist()


# --- loss


def test_the_loss_with_all_tokens_is_the_stock_models(vlm, data):
    """One conversation at a time by the stock class; the batch has the mean over all answer tokens."""
    learner = build_learner(tiny_llava(), 0, "topk_ste", 0.2, 10.0)
    found = read(data)
    losses, counts = [], []
    for row, number in enumerate(WITH_IMAGE):
        inputs = stock_inputs(vlm, number, data.parent)
        with torch.no_grad():
            losses.append(float(vlm.model(**inputs).loss))
        counts.append(int((inputs["labels"] != IGNORE).sum()))
        alone = Conversations(learner.vlm, found, 10_000)._batch(np.array([row]), 1)
        with torch.no_grad():
            mine = learner.answer_loss(alone, learner.features(alone), torch.ones(1, TOKENS))
        assert float(mine) == pytest.approx(losses[-1], rel=1e-5)
    together = Conversations(learner.vlm, found, 10_000)._batch(np.arange(len(WITH_IMAGE)), len(WITH_IMAGE))
    with torch.no_grad():
        mine = learner.answer_loss(together, learner.features(together), torch.ones(len(WITH_IMAGE), TOKENS))
    assert float(mine) == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    assert np.std(losses) > 0.1


def test_a_half_precision_model_teaches_a_module_in_float32(data):
    vlm = tiny_llava()
    vlm.model.to(torch.bfloat16)
    learner = build_learner(vlm, 0, "topk_ste", 0.2, 10.0)
    batch = Conversations(vlm, read(data), 10_000).draw(np.random.default_rng(0), 3)
    scalars = learner(batch)
    scalars["answers"].backward()
    assert float(scalars["keep_rate"]) == pytest.approx(7 / 36)
    for parameter in learner.lpm.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any()


# --- training


SCHEDULE = PhaseSchedule(
    steps=4, batch_size=2, learning_rate=3e-3, warmup=1, checkpoint_every=1, evaluate_every=2, log_every=2
)


class Killed(Exception):
    pass


def train(data, folder, kill_at=None, share=0.5, seed=5):
    logged, vlm = [], tiny_llava()

    def log(step, metrics):
        logged.append((step, metrics))
        if step == kill_at:
            raise Killed

    conversations = Conversations(vlm, read(data, share, seed), 10_000)
    learner = build_learner(vlm, seed, "topk_ste", 0.2, 10.0)
    output = folder / "lpm.safetensors"
    train_pruner(
        learner, conversations, output, folder / "checkpoints", seed=seed, schedule=SCHEDULE, facts={}, log=log
    )  # fmt: skip
    return output, logged


def test_a_killed_training_resumes_to_the_same_bytes(data, tmp_path):
    whole, _ = train(data, tmp_path / "whole")
    with pytest.raises(Killed):
        train(data, tmp_path / "cut", kill_at=2)
    assert not (tmp_path / "cut/lpm.safetensors").exists()
    resumed, logged = train(data, tmp_path / "cut")
    assert logged[0][0] == 2, "step 2 is done again, step 1 is not"
    assert resumed.read_bytes() == whole.read_bytes()
    assert train(data, tmp_path / "more", share=1.0)[0].read_bytes() != whole.read_bytes(), "the share matters"


def test_only_the_module_learns_and_its_loss_on_the_taught_falls(data):
    vlm, stock = tiny_llava(), tiny_llava()
    learner = build_learner(vlm, 0, "topk_ste", 0.2, 10.0)
    fresh = [parameter.detach().clone() for parameter in learner.lpm.parameters()]
    batch = Conversations(vlm, read(data), 10_000).draw(np.random.default_rng(1), len(WITH_IMAGE))
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = learner(batch)["answers"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < losses[0] - 0.05, losses
    assert all((one != other).any() for one, other in zip(fresh, learner.lpm.parameters(), strict=True))
    for (name, mine), theirs in zip(vlm.model.state_dict().items(), stock.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_what_is_written_holds_the_module_and_curves_of_unseen_conversations(data, tmp_path):
    output, logged = train(data, tmp_path / "run")
    file = read_lpm(output)
    assert isinstance(file.lpm, Lpm) and file.encoder == tiny_llava().encoder_fingerprint()
    names = {name for _, metrics in logged for name in metrics}
    assert {"pruner/loss_answers", "pruner/validation_loss_lpm", "pruner/validation_loss_random"} <= names
    _, logged = train(data, tmp_path / "all", share=1.0)
    assert not any("validation" in name for _, metrics in logged for name in metrics), "all are taught"


# --- the share


def test_a_share_is_of_the_conversations_about_images_and_validation_is_of_the_others(vlm, data):
    found = read(data, share=0.5, seed=3)
    assert found.text_only == 2 and len(found.entries) == 6
    assert found.taught.tolist() == draw_subset(3, 6, 0.5).tolist()
    taught = {found.conversation(row).entry for row in found.taught}
    others = {found.conversation(row).entry for row in found.held_out}
    assert len(taught) == len(others) == 3 and taught | others == set(WITH_IMAGE)
    assert set(read(data, share=0.3, seed=3).taught) < set(found.taught)
    assert str(found) == (
        f"{data}: 3 of 6 conversations about images are taught; 2 entries without an image are left out"
    )
    conversations = Conversations(vlm, found, 10_000)
    drawn = {
        tuple(row[row != vlm.end_tokens[0]].tolist())
        for step in range(8)
        for row in conversations.draw(step_rng(0, "pruner", step, 0), 2)["input_ids"]
    }
    assert len(drawn) == 3, "every one of the share comes up, and no other"
    unseen = conversations.validation(13, 3)["input_ids"]
    assert not drawn & {tuple(row[row != vlm.end_tokens[0]].tolist()) for row in unseen}


def test_a_batch_follows_from_its_generator_and_processes_draw_their_own(vlm, data):
    conversations = Conversations(vlm, read(data), 10_000)
    first, again, other = (conversations.draw(step_rng(7, "pruner", 3, process), 3) for process in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        first["input_ids"], other["input_ids"]
    )
    assert conversations.draw(step_rng(7, "pruner", 3, 0), 9)["pixels"].shape[0] == 9, "more than there are: again"


def test_what_does_not_fit_is_replaced_by_the_next_of_the_draw(vlm, data):
    found = read(data)
    lengths = [len(pack_conversation(vlm, found.conversation(row).turns[:1], 10_000).input_ids) for row in range(6)]
    limit = sorted(lengths)[2]
    conversations = Conversations(vlm, found, limit)
    fitting = sum(length <= limit for length in lengths)
    for step in range(4):
        batch = conversations.draw(step_rng(0, "pruner", step, 0), fitting)
        assert len({tuple(row.tolist()) for row in batch["input_ids"]}) == fitting
        assert batch["input_ids"].shape[1] <= limit
    with pytest.raises(InstructionDataError) as caught:
        Conversations(vlm, found, 20).draw(np.random.default_rng(0), 2)
    assert str(caught.value) == f"{data}: no conversation fits into max_tokens = 20; an image alone takes 36"


# --- the file


@pytest.mark.parametrize(
    "options", [{}, {"ensure_ascii": False}, {"indent": 1}, {"ensure_ascii": False, "indent": "\t"}]
)
@pytest.mark.parametrize("chunk", [1, 2, 13, 97, 2**20])
def test_entries_are_found_wherever_chunks_of_the_file_end(tmp_path, monkeypatch, options, chunk):
    path = write_data(tmp_path, **options)
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = read(path)
    content, read_back = path.read_bytes(), json.loads(path.read_text("utf-8"))
    assert found.entries[:, 0].tolist() == WITH_IMAGE
    for number, begin, end in found.entries:
        assert json.loads(content[begin:end]) == read_back[number]
    assert all(end <= begin for (_, _, end), (_, begin, _) in pairwise(found.entries))
    assert found.digest == module.hashlib.sha256(content).hexdigest()
    assert found.conversation(2).turns[0][1] == "Ein Café – 猫 near the sign\nand two dogs."


def test_images_are_read_when_drawn_and_only_those_of_the_share_need_be_there(vlm, data):
    found = read(data, share=0.5, seed=3)
    for row in found.held_out:
        found.conversation(row).image.unlink()
    again = read(data, share=0.5, seed=3)
    assert Conversations(vlm, again, 10_000).draw(np.random.default_rng(0), 3)["pixels"].shape == (3, 3, 24, 24)
    broken = again.conversation(again.taught[0])
    broken.image.write_bytes(broken.image.read_bytes()[:200])
    damaged = Conversations(vlm, read(data, share=0.5, seed=3), 10_000)
    with pytest.raises(InstructionDataError) as caught:
        damaged.draw(np.random.default_rng(0), 3)
    start = f"{broken.image}: the image of entry {broken.entry} cannot be read ("
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    broken.image.write_text("no image")
    with pytest.raises(InstructionDataError, match=r"cannot be read \(UnidentifiedImageError: cannot identify image"):
        damaged.draw(np.random.default_rng(0), 3)


def test_a_file_that_changes_under_a_training_is_noticed(vlm, data):
    found = read(data)
    data.write_text(data.read_text().replace("conversations", "conversation"))
    with pytest.raises(InstructionDataError) as caught:
        Conversations(vlm, found, 10_000).draw(np.random.default_rng(0), 6)
    assert str(caught.value).startswith(f"{data}: entry ")
    assert "is not what it was when the training began" in str(caught.value)


def changed(number: int, **values) -> list:
    return [*ENTRIES[:number], ENTRIES[number] | values, *ENTRIES[number + 1 :]]


def said(number: int, turn: int, **values) -> list:
    turns = ENTRIES[number]["conversations"]
    return changed(number, conversations=[*turns[:turn], turns[turn] | values, *turns[turn + 1 :]])


DAMAGE = {
    "an entry that is no object": (
        [*ENTRIES[:3], "words"],
        'entry 3 = "words": expected an object with image and conversations',
    ),
    "several images": (
        changed(1, image=["a.png", "b.png"]),
        'entry 1: image = ["a.png", "b.png"]: expected one path below the images\' folder',
    ),
    "an empty image": (changed(0, image=""), 'entry 0: image = "": expected one path below the images\' folder'),
    "an image elsewhere": (
        changed(0, image="/photos/0.png"),
        'entry 0: image = "/photos/0.png": expected one path below the images\' folder',
    ),
    "no conversation": (
        [*ENTRIES[:6], {"id": "6", "image": "photos/6.png"}],
        "entry 6: conversations = null: expected a list of turns",
    ),
    "an empty conversation": (changed(6, conversations=[]), "entry 6: conversations = []: expected a list of turns"),
    "a turn that is no object": (
        changed(6, conversations=["<image>\nWhat?", "A dog"]),
        'entry 6: conversations.0 = "<image>\\nWhat?": expected an object with from and value',
    ),
    "gpt first": (
        changed(6, conversations=ENTRIES[6]["conversations"][::-1]),
        "entry 6: conversations.0.from = \"gpt\": expected 'human'; human and gpt take turns, human first",
    ),
    "human twice": (
        said(1, 3, **{"from": "human"}),
        "entry 1: conversations.3.from = \"human\": expected 'gpt'; human and gpt take turns, human first",
    ),
    "a role of another format": (
        changed(6, conversations=[{"role": "user", "content": "<image>\nWhat?"}]),
        "entry 6: conversations.0.from = null: expected 'human'; human and gpt take turns, human first",
    ),
    "a question without an answer": (
        changed(1, conversations=ENTRIES[1]["conversations"][:3]),
        "entry 1: conversations: 3 turns: expected one of gpt at the end",
    ),
    "an answer that is no text": (said(1, 1, value=2), "entry 1: conversations.1.value = 2: expected text"),
    "no placeholder": (
        said(3, 0, value="Wo ist das Café?"),
        'entry 3: conversations.0.value = "Wo ist das Café?": expected <image> in it',
    ),
    "a placeholder in a later turn": (
        said(1, 2, value="And in <image>?"),
        'entry 1: conversations.2.value = "And in <image>?": expected <image> in the first turn only',
    ),
    "a placeholder in an answer": (
        said(6, 1, value="<image>"),
        'entry 6: conversations.1.value = "<image>": expected <image> in the first turn only',
    ),
    "a long wrong value": (
        said(6, 0, value="x" * 500),
        f'entry 6: conversations.0.value = "{"x" * 79}...: expected <image> in it',
    ),
    "text only": ([ENTRIES[2], ENTRIES[5]], "none of its 2 entries has an image: there is nothing to teach"),
    "nothing": ([], "none of its 0 entries has an image: there is nothing to teach"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_wrong_entry_is_one_line_with_its_number_its_key_and_what_is_expected(name, tmp_path):
    entries, message = DAMAGE[name]
    path = write_data(tmp_path, entries)
    with pytest.raises(InstructionDataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {message}"


LIST = "; the file must be a JSON list of entries"
FILES = {
    "an object": (b'{"a": []}', "byte 0: expected '[', found '{'" + LIST),
    "nothing": (b"", "byte 0: expected '[', found the end of the file" + LIST),
    "one entry a line": (b'{"id": 1}\n{"id": 2}\n', "byte 0: expected '[', found '{'" + LIST),
    "cut between entries": (b'[{"id": "\xc3\xa9"}', "byte 13: expected ',', found the end of the file" + LIST),
    "cut within an entry": (b'[{"id": "\xc3\xa9"}, {"id": "\xc3\xa9"', "byte 26: Expecting ',' delimiter"),
    "no comma": (b'[{"id": 1} {"id": 2}]', "byte 11: expected ',', found '{'" + LIST),
    "a comma too many": (b'[{"id": 1}, ]', "byte 12: Expecting value"),
    "more behind the list": (b"[] x", "byte 3: expected the end of the file, found 'x'" + LIST),
    "an entry without end": (b'[{"id":' + b"[" * 3000, "byte 1: nested too deeply for an entry"),
    "another encoding": ('[{"id": "é"}]'.encode("latin-1"), "not UTF-8 (invalid continuation byte)"),
}


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line_with_its_place(name, chunk, tmp_path, monkeypatch):
    content, message = FILES[name]
    monkeypatch.setattr(module, "CHUNK", chunk)
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(InstructionDataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {message}"


def test_missing_files_are_named(data):
    form = "expected instruction data in LLaVA's form, such as llava_v1_5_mix665k.json"
    for path, reason in ((data.with_name("other.json"), "No such file or directory"), (data.parent, "Is a directory")):
        with pytest.raises(InstructionDataError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {reason}; {form}"
    image = data.parent / ENTRIES[3]["image"]
    image.unlink()
    with pytest.raises(InstructionDataError) as caught:
        read(data)
    assert str(caught.value) == (
        f"{data}: entry 3: image: no such file {image}; pruner.images_folder is where image paths begin"
    )


def test_there_is_no_validation_where_all_is_taught(vlm, data):
    assert evaluator(vlm, Conversations(vlm, read(data), 10_000)) is None
