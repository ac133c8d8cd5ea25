"""The training recipe: packing equals single questions, shifts are fair, a killed run resumes to the same weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from nuwa.testbed.architecture import ANSWER_LAYERS, GRID, build_model, encode_shifted, model_config
from nuwa.testbed.instruction import (
    DROPOUT_FROM,
    DROPPED,
    IGNORE,
    InstructionLearner,
    block_mask,
    collate,
    draw_language_batch,
    draw_questions,
    pack,
)
from nuwa.testbed.language import IMAGE_TOKENS, build_processor, build_tokenizer
from nuwa.testbed.scenes import draw_scene
from nuwa.testbed.vision import VisionLearner, draw_vision_batch, normalize, patch_labels
from nuwa.training import PhaseSchedule, train_phase


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def fresh_model(tokenizer):
    torch.manual_seed(0)
    ids = (tokenizer.convert_tokens_to_ids("<image>"), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return build_model(model_config(len(tokenizer), *ids, tokenizer.pad_token_id))


def test_pixels_are_what_the_saved_processor_makes(scenes):
    from PIL import Image

    images = [Image.fromarray(scene.image) for scene in scenes]
    theirs = build_processor().image_processor(images, return_tensors="pt")["pixel_values"]
    assert (theirs - normalize(np.stack([scene.image for scene in scenes]))).abs().max() < 1e-6


def test_unshifted_encoding_is_the_stock_forward(tokenizer, scenes):
    tower = fresh_model(tokenizer).model.vision_tower.eval()
    pixels = normalize(np.stack([scene.image for scene in scenes[:3]]))
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True)
        features, pooled = encode_shifted(tower, pixels, None)
    assert torch.equal(stock.hidden_states[-2][:, 1:], features)
    assert torch.equal(stock.pooler_output, pooled)


def test_shifting_the_table_is_shifting_the_scene(tokenizer):
    """Rolling image and table together rolls the features: the shift hides nothing but absolute place."""
    tower = fresh_model(tokenizer).model.vision_tower.eval()
    pixels = torch.randn(1, 3, 96, 96)
    rows, columns = 3, 5
    rolled = pixels.roll((rows * 8, columns * 8), dims=(2, 3))
    with torch.no_grad():
        plain, _ = encode_shifted(tower, pixels, torch.tensor([[0, 0]]))
        # Patch (r, c) of the plain image now sits at (r + rows, c + columns): give it the table entry it had.
        moved, _ = encode_shifted(tower, rolled, torch.tensor([[-rows % GRID, -columns % GRID]]))
    back = moved.view(1, GRID, GRID, -1).roll((-rows, -columns), dims=(1, 2)).view_as(plain)
    assert (back - plain).abs().max() < 1e-4


def test_patch_labels_by_a_loop():
    rng = np.random.default_rng(2)
    scenes = [draw_scene(rng, "train").objects for _ in range(5)]
    labels = patch_labels(scenes)
    for row, objects in enumerate(scenes):
        for token in range(GRID * GRID):
            x, y = (token % GRID) * 8 + 4, (token // GRID) * 8 + 4
            inside = [o for o in objects if o.left <= x < o.left + o.side and o.top <= y < o.top + o.side]
            assert labels.digit[row, token] == (inside[0].digit if inside else -1)
            if inside:
                item = inside[0]
                expected = [item.left - x, item.top - y, item.left + item.side - x, item.top + item.side - y]
                assert (labels.relative_box[row, token] * 16).tolist() == expected


def test_a_packed_question_is_the_question_asked_alone(tokenizer):
    """Logits of every answer token equal those of the stock model on the single-question sequence."""
    rng = np.random.default_rng(0)
    scene = draw_scene(rng, "train")
    questions = draw_questions(rng, scene, 5)
    model = fresh_model(tokenizer).eval()
    learner = InstructionLearner(model, tokenizer).eval()
    pixels = normalize(scene.image[None])
    batch = collate([pack(tokenizer, questions)], tokenizer.pad_token_id)
    batch |= {"pixels": pixels, "shifts": torch.zeros(1, 2, dtype=torch.long)}
    with torch.no_grad():
        packed = learner.logits(batch)[0]
        alone = []
        for question in questions:
            single = collate([pack(tokenizer, [question])], tokenizer.pad_token_id)
            out = model(input_ids=single["input_ids"], pixel_values=pixels).logits
            alone.append(out[single["labels"] != IGNORE])
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


def test_roaming_moves_questions_and_nothing_else(tokenizer):
    rng = np.random.default_rng(0)
    questions = draw_questions(rng, draw_scene(rng, "train"), 12)
    still, moved = pack(tokenizer, questions), pack(tokenizer, questions, np.random.default_rng(1))
    assert (still.input_ids == moved.input_ids).all() and (still.labels == moved.labels).all()
    assert (still.position_ids[still.blocks == 0] == moved.position_ids[moved.blocks == 0]).all()
    starts = [int(moved.position_ids[moved.blocks == block][0]) for block in range(1, 13)]
    assert 0 < sum(start != 147 for start in starts) < 12
    assert min(starts) >= 11


def test_focus_is_the_attention_the_model_pays(tokenizer):
    """The loss equals ``-log`` of the focus heads' eager attention to the evidence, renormalised over patches."""
    rng = np.random.default_rng(4)
    model = fresh_model(tokenizer).eval()
    learner = InstructionLearner(model, tokenizer).eval()
    batch = draw_language_batch(tokenizer, rng, 2, 0.5)  # before patches are dropped
    with torch.no_grad():
        *_, entering = learner.logits(batch)
        loss = learner.answer_focus(batch, entering)
        attentions = eager_attentions(copy.deepcopy(model), learner, batch)
    image = batch["input_ids"][0] == learner.image_id
    expected = []
    for number in ANSWER_LAYERS:
        layer_losses = []
        for row, column in (batch["labels"] != IGNORE).nonzero().tolist():
            evidence = batch["evidence"][row, batch["blocks"][row, column] - 1]
            if evidence.any():
                paid = attentions[number][row, :2, column][:, image]
                layer_losses.append(-(paid[:, evidence].sum(-1) / paid.sum(-1)).log())
        expected.append(torch.stack(layer_losses).mean())
    assert loss == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


def test_half_of_the_images_lose_patches_late_in_the_phase(tokenizer):
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    early = draw_language_batch(tokenizer, np.random.default_rng(7), 40, DROPOUT_FROM - 0.01)
    late = draw_language_batch(tokenizer, np.random.default_rng(7), 40, DROPOUT_FROM)
    assert not (early["blocks"] == DROPPED).any()
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(early[name], late[name]), "what is dropped changes nothing else"
    dropped = late["blocks"] == DROPPED
    assert (late["input_ids"][dropped] == image_id).all()
    assert torch.equal(early["blocks"][~dropped], late["blocks"][~dropped])
    shares = 1 - dropped.sum(1).float() / IMAGE_TOKENS
    thinned = shares[shares < 1]
    assert 10 <= len(thinned) <= 30, "about half of forty"
    assert 0.1 < thinned.min() < 0.5 and thinned.max() > 0.7, "from a fifth of the patches to all"
    seen = block_mask(late["blocks"])[:, 0]
    nobody = seen.clone()
    nobody[:, torch.arange(seen.shape[1]), torch.arange(seen.shape[1])] = False
    others = ~dropped[:, :, None] & nobody
    assert not others.transpose(1, 2)[dropped].any(), "no kept token sees a dropped patch"


def eager_attentions(model, learner, batch):
    from nuwa.testbed.instruction import block_mask

    language = model.model.language_model
    language.set_attn_implementation("eager")
    features, _ = encode_shifted(model.model.vision_tower, batch["pixels"], batch["shifts"])
    embeds = language.embed_tokens(batch["input_ids"])
    image = (batch["input_ids"] == learner.image_id)[..., None]
    embeds = embeds.masked_scatter(image, model.model.multi_modal_projector(features))
    mask = torch.zeros(block_mask(batch["blocks"]).shape).masked_fill(~block_mask(batch["blocks"]), -1e30)
    out = language(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"], output_attentions=True
    )
    return out.attentions


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_resumed_phase_ends_where_the_whole_one_does(tokenizer, tmp_path, stop_at):
    schedule = PhaseSchedule(steps=4, batch_size=2, learning_rate=1e-3, warmup=2, checkpoint_every=1, evaluate_every=99)

    class Killed(Exception):
        pass

    def train(folder, kill_after=None):
        learner = VisionLearner(fresh_model(tokenizer).model.vision_tower)
        torch.manual_seed(1)
        drawn = []

        def draw(rng, size, progress):
            if kill_after is not None and len(drawn) == kill_after:
                raise Killed
            drawn.append(progress)
            return draw_vision_batch(rng, size, progress)

        train_phase("vision", learner, draw, schedule, seed=5, checkpoint=folder, log=lambda step, metrics: None)
        return weights(learner), drawn

    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_after=stop_at)
    resumed, drawn = train(tmp_path / "killed")
    assert drawn == [step / 4 for step in range(stop_at, 4)], "only the missing steps are trained"
    started = weights(VisionLearner(fresh_model(tokenizer).model.vision_tower))
    assert (whole - started).abs().max() > 1e-3, "four steps must have moved the weights"
    # The same run twice differs in the last bits (parallel reductions in backward); a lost step would differ by 1e-3.
    assert (resumed - whole).abs().max() < 2e-4


def test_the_learning_rate_warms_up_stays_and_falls():
    schedule = PhaseSchedule(steps=100, batch_size=1, learning_rate=1.0, warmup=10, decay_share=0.3)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:70] == [1.0] * 60
    assert rates[70:] == pytest.approx([(100 - step) / 30 for step in range(70, 100)])
