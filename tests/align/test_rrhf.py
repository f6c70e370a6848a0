"""RRHF: the loss by hand and by finite differences; the trainer against answers scored one by one."""

import pytest
import torch
from datasets import Dataset
from tiny import arguments, llama

from llmkit.align.preferences import RankedCollator
from llmkit.align.rrhf import RrhfTrainer, best_answers, rank_loss, ranked_pairs, rrhf_loss

SCORES = torch.tensor([1.0, 0.0, 2.0, 2.0, 5.0])  # two answers to one prompt, three to another, two of them as good
GROUP = torch.tensor([0, 0, 1, 1, 1])


def batch(seed=0):
    """Rows as the encoder gives them: two, three and four answers of 1 to 6 tokens, some scores equal."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(5, 400, (count,), generator=draw).tolist()

    scores = [[0.0, 1.0], [2.0, 2.0, -1.0], [0.5, 0.25, 3.0, 0.5]]
    return [
        {
            "prompt_ids": tokens(2 + 3 * i),
            "completion_ids": [tokens(1 + (3 * i + 2 * k) % 6) for k in range(len(of))],
            "scores": of,
        }
        for i, of in enumerate(scores)
    ]


def by_hand(model, rows, rank_weight):
    """(loss per prompt, figures) without padding, one answer at a time, in plain Python."""
    losses, ranking, likelihood, margins = [], [], [], []
    for row in rows:
        sums = []
        for answer in row["completion_ids"]:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([row["prompt_ids"] + answer])).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"]) - 1
            sums.append(sum(logps[start + k, token].item() for k, token in enumerate(answer)))
        means = [total / len(answer) for total, answer in zip(sums, row["completion_ids"], strict=True)]
        gaps = [means[j] - means[i] for i, a in enumerate(row["scores"]) for j, b in enumerate(row["scores"]) if a < b]
        ranking.append(sum(max(0.0, -gap) for gap in gaps))
        likelihood.append(-sums[row["scores"].index(max(row["scores"]))])
        losses.append(rank_weight * ranking[-1] + likelihood[-1])
        margins += gaps
    figures = {
        "loss": sum(losses) / len(rows),
        "ranking": sum(ranking) / len(rows),
        "nll": sum(likelihood) / len(rows),
        "rewards/accuracies": sum(gap > 0 for gap in margins) / len(margins),
        "rewards/margins": sum(margins) / len(margins),
    }
    return losses, figures


def trainer(rows=None, seed=0, **options):
    rows = batch() if rows is None else rows
    return RrhfTrainer(
        model=llama(seed, initializer_range=0.2),  # with the usual 0.02 all tokens are about equally likely
        args=arguments(**options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=RankedCollator(0),
        rank_weight=0.7,
    )


# ---- the loss


def test_rank_loss_by_hand_and_ties_count_for_nothing():
    logps = torch.tensor([-1.0, -0.5, -2.0, -1.0, -1.5])
    # worse over better: 1 over 0 by 0.5; 2 under 4 by 0.5; 3 over 4 by 0.5; 2 and 3 are as good
    loss, in_order, margin = rank_loss(logps, SCORES, GROUP)
    assert ranked_pairs(SCORES, GROUP).nonzero().tolist() == [[1, 0], [2, 4], [3, 4]]
    assert loss.item() == pytest.approx((0.5 + 0.5) / 2)
    assert in_order.item() == pytest.approx(1 / 3)
    assert margin.item() == pytest.approx((-0.5 + 0.5 - 0.5) / 3)


def test_a_batch_of_equal_scores_gives_0_and_no_nan():
    figures = rank_loss(torch.tensor([-1.0, -2.0]), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert [value.item() for value in figures] == [0, 0, 0]


def test_the_first_best_answer_of_every_prompt():
    assert best_answers(SCORES, GROUP).tolist() == [0, 4]
    assert best_answers(torch.tensor([0.0, 3.0, 3.0, -1.0, -1.0]), GROUP).tolist() == [1, 2]


def test_loss_by_hand_of_answers_of_different_lengths():
    logps = torch.tensor(
        [[-1.0, -3.0, 0.0], [-9.0, -1.0, -2.0], [-2.0, -9.0, -9.0], [-4.0, -2.0, -3.0], [-1.0, -2, -9]]
    )
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    # sums -4, -3, -2, -9, -3; means -4/3, -3/2, -2, -3, -3/2: every better answer is likelier but for none
    loss, told = rrhf_loss(logps, mask, SCORES, GROUP, rank_weight=2.0)
    assert loss.item() == pytest.approx((4 + 3) / 2)
    expected = {
        "ranking": 0.0,
        "nll": (4 + 3) / 2,
        "rewards/accuracies": 1.0,
        "rewards/margins": (1 / 6 + 1 / 2 + 3 / 2) / 3,
        "logps/chosen": (-4 - 3) / 2,
        "mean_length_best": (3 + 2) / 2,
    }
    assert {key: value.item() for key, value in told.items()} == pytest.approx(expected)
    # the other way round (scores 5, 2, 2 of the second prompt): 3 pairs, two of them wrong by 1/2 and by 0
    loss, told = rrhf_loss(logps, mask, torch.tensor([0.0, 1.0, 2.0, 5.0, 2.0]), GROUP, rank_weight=2.0)
    assert told["ranking"].item() == pytest.approx((1 / 6 + 1 + 3 / 2) / 2)
    assert loss.item() == pytest.approx(2 * (1 / 6 + 1 + 3 / 2) / 2 + (3 + 9) / 2)


def test_gradients_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(1)
    logps = -torch.rand((5, 4), generator=draw, dtype=torch.float64) * 4
    mask = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])
    assert rrhf_loss(logps, mask, SCORES, GROUP, 3.0)[1]["ranking"] > 0.1  # or there is nothing to see
    assert torch.autograd.gradcheck(lambda x: rrhf_loss(x, mask, SCORES, GROUP, 3.0)[0], logps.requires_grad_())


# ---- the trainer


def test_the_batch_loss_is_that_of_answers_alone_without_padding():
    it = trainer()
    losses, figures = by_hand(it.model.eval(), batch(), 0.7)
    loss, outputs = it.compute_loss(it.model, RankedCollator(0)(batch()), return_outputs=True)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert outputs.logits.shape[0] == 9
    told = {key: values[-1] for key, values in it._metrics["eval"].items()}
    assert {key: told[key] for key in figures if key != "loss"} == pytest.approx(
        {key: value for key, value in figures.items() if key != "loss"}, rel=1e-5
    )
    assert figures["ranking"] > 0.1 and 0 < figures["rewards/accuracies"] < 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_evaluation_is_a_mean_over_prompts_and_pairs_whatever_the_batch_size(size):
    """Batches were weighed by their answers: a prompt with four of them counted twice one with two."""
    it = trainer(per_device_eval_batch_size=size)
    _, expected = by_hand(it.model.eval(), batch(), 0.7)
    found = it.evaluate()
    assert {key: found[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_make_the_step_of_one_batch():
    """Trainer.__init__ overwrote what said that the loss is a mean: three batches made a step three times as long."""
    steps = []
    for size, accumulated in ((1, 3), (3, 1)):
        it = trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1, optim="sgd",
            learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        )  # fmt: skip
        before = torch.cat([p.detach().flatten().clone() for p in it.model.parameters()])
        it.train()
        steps.append(torch.cat([p.detach().flatten() for p in it.model.parameters()]) - before)
    assert steps[0].norm() > 1e-3
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[1].norm()


def test_logs_of_training_and_of_evaluation_hold_their_own_figures():
    it = trainer(
        per_device_train_batch_size=1, max_steps=3, logging_strategy="steps", logging_steps=3, eval_strategy="steps",
        eval_steps=2, learning_rate=0.0,
    )  # fmt: skip
    _, expected = by_hand(it.model.eval(), batch(), 0.7)
    it.train()
    evaluated, trained = (next(row for row in it.state.log_history if key in row) for key in ("eval_loss", "loss"))
    assert evaluated["eval_nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert not [key for key in evaluated if key in expected]
    assert {key: trained[key] for key in ("loss", "ranking", "nll")} == pytest.approx(
        {key: expected[key] for key in ("loss", "ranking", "nll")}, rel=1e-4
    )
    assert trained["num_tokens"] == sum(len(r["prompt_ids"] + a) for r in batch() for a in r["completion_ids"])
