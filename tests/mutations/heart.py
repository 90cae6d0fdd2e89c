"""Mistakes that someone could make in the heart of mistill, one a line of code.

Each names a file, a piece of its text that stands there once, what a mistaken hand might write
instead, and the tests that must notice. ``test_mutations.py`` makes them one by one in a copy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: What is wrong, in a few words.
        file: The file, from the root of the repository.
        right: What stands there, once.
        wrong: What stands there by mistake.
        tests: The tests that must fail, as pytest takes them.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


_STEP = ("tests/distill/training/test_step.py",)
_LOSSES = ("tests/mistill/loss/test_losses.py",)
_DIVERGENCES = ("tests/mistill/loss/test_divergences.py",)
_TARGETS = ("tests/distill/teacher/test_teacher.py", "tests/distill/targets/test_draws.py")
_KERNEL = ("tests/mistill/loss/test_triton_kernel.py",)
_SCHEDULE = ("tests/mistill/training/test_schedule.py",)
_TEXT = ("tests/mistill/text/test_text.py",)
_KL = ("tests/mistill/measures/test_kl.py",)
_GPTQ = ("tests/quantize/gptq/test_gptq.py",)
_GRID = ("tests/mistill/weights/test_grid.py", "tests/quantize/gptq/test_gptq.py")
_PACKING = ("tests/mistill/weights/test_gptq_layout.py",)
_NF4 = ("tests/quantize/nf4/test_nf4_codec.py",)
_GRAPH = ("tests/export/graph/test_graph.py",)
_PORTABLE = ("tests/export/graph/test_portable.py",)
_ENGINE = ("tests/mistill/engine/test_engine.py",)
_SPECULATION = ("tests/mistill/engine/test_speculation.py",)
_SAMPLING = ("tests/mistill/engine/test_sampling.py",)
_LAYERS = ("tests/mistill/pytorch/test_layers.py",)
_STUDENT = ("tests/distill/student/test_importance.py", "tests/distill/student/test_width.py")

_HEALING = ("tests/distill/healing/test_healing.py", "tests/distill/healing/test_least_squares.py")

MUTATIONS = (
    # --- text that is kept back, and a teacher that is asked once ---------------------------------
    Mutation(
        "documents that are kept back are those that are trained on",
        "mistill/training/kept_back.py",
        "    return place < share\n",
        "    return place >= share\n",
        ("tests/mistill/training/test_kept_back.py",),
    ),
    Mutation(
        "a block reads the teacher's states of the one before it",
        "quantize/scales/teacher_states.py",
        "zip([0, *ends], ends, strict=False)",
        "zip([0, 0, *ends], [0, *ends], strict=False)",
        ("tests/quantize/scales/test_teacher_states.py",),
    ),
    # --- text and labels ------------------------------------------------------------------------
    Mutation(
        "labels are the tokens themselves, not the next ones",
        "mistill/loss/batches.py",
        "blocks.ids[:, 1:][kept[:, :-1]]",
        "blocks.ids[:, :-1][kept[:, :-1]]",
        _STEP,
    ),
    Mutation(
        "the mask of labels is not shifted",
        "mistill/text/blocks.py",
        "self.mask[:, 1:] & same",
        "self.mask[:, :-1] & same",
        _TEXT,
    ),
    Mutation(
        "the last token of a document predicts the next document",
        "mistill/text/blocks.py",
        "self.mask[:, 1:] & same &",
        "self.mask[:, 1:] &",
        ("tests/distill/training/test_evaluation.py",),
    ),
    Mutation(
        "positions go on from one document to the next",
        "mistill/text/blocks.py",
        "np.where(begins, columns, 0)",
        "np.where(begins, 0, 0)",
        _TEXT,
    ),
    # --- distillation ---------------------------------------------------------------------------
    Mutation(
        "forward_kl is KL(student || teacher)",
        "mistill/loss/losses.py",
        "(p.exp() * (p - q))",
        "(q.exp() * (q - p))",
        _LOSSES,
    ),
    Mutation(
        "forward_kl is multiplied by T, not by its square",
        "mistill/loss/losses.py",
        "* temperature**2).to(dtype)",
        "* temperature).to(dtype)",
        _LOSSES,
    ),
    Mutation(
        "the loss of a step is multiplied by T, not by its square",
        "mistill/loss/losses.py",
        "apart *= recipe.temperature**2",
        "apart *= recipe.temperature",
        _LOSSES,
    ),
    Mutation(
        "the gradient forgets the temperature",
        "mistill/loss/losses.py",
        "G.mul_((1 - c) * T / total)",
        "G.mul_((1 - c) / total)",
        _LOSSES,
    ),
    Mutation(
        "the gradient of the cross-entropy pushes the label down",
        "mistill/loss/losses.py",
        "torch.full_like(picked, -c / total, dtype=G.dtype)",
        "torch.full_like(picked, c / total, dtype=G.dtype)",
        _LOSSES,
    ),
    Mutation(
        "the fused loss has a temperature of 1",
        "mistill/loss/losses.py",
        "forward_kl_rows(G, p_logits, T, gradient=wants_gradient)",
        "forward_kl_rows(G, p_logits, 1.0, gradient=wants_gradient)",
        _KERNEL,
    ),
    Mutation(
        "the fused gradient forgets the temperature",
        "mistill/loss/losses.py",
        "G.mul_(T * head.scale / recipe.positions_in_step)",
        "G.mul_(head.scale / recipe.positions_in_step)",
        _KERNEL,
    ),
    Mutation(
        "the Triton kernel does not soften the teacher",
        "mistill/loss/triton_kernel.py",
        "log_p = tl.load(z_teacher + start + lanes, mask=inside, other=0.0) * inverse - norm_p",
        "log_p = tl.load(z_teacher + start + lanes, mask=inside, other=0.0) - norm_p",
        _KERNEL,
    ),
    Mutation(
        "the gradient of forward KL adds the teacher",
        "mistill/loss/divergences.py",
        "log_q.exp_().sub_(p)",
        "log_q.exp_().add_(p)",
        _DIVERGENCES,
    ),
    Mutation(
        "forward KL is weighted by the student",
        "mistill/loss/divergences.py",
        "    p = torch.exp(log_p, out=scratch[0])\n    row = log_p.sub_(log_q).mul_(p).sum(dim=-1)",
        "    p = torch.exp(log_q, out=scratch[0])\n    row = log_p.sub_(log_q).mul_(p).sum(dim=-1)",
        _DIVERGENCES,
    ),
    Mutation(
        "the entropy of sampled targets is added",
        "mistill/loss/targets.py",
        "- self.entropy[rows]",
        "+ self.entropy[rows]",
        _TARGETS,
    ),
    Mutation(
        "the rest of the vocabulary has no gradient under top-k targets",
        "mistill/loss/targets.py",
        "log_q.exp_().sub_(outside.exp_().mul_(share[:, None]))",
        "log_q.exp_()",
        _TARGETS,
    ),
    Mutation(
        "the divisions by accelerate are not undone",
        "distill/training/step.py",
        "accelerator.backward(result.loss * share)",
        "accelerator.backward(result.loss)",
        (*_STEP, "tests/distill/training/test_trained_folder.py"),
    ),
    Mutation(
        "the gradient is a mean over each micro-batch",
        "distill/training/step.py",
        'module("loss", batch, targets, max(kept, 1), cross_entropy)',
        'module("loss", batch, targets, max(int(batch.kept.sum()), 1), cross_entropy)',
        _STEP,
    ),
    Mutation(
        "influence is the cosine, not one minus it",
        "distill/student/importance.py",
        "return 1 - torch.cosine_similarity(before, after, dim=-1)",
        "return torch.cosine_similarity(before, after, dim=-1)",
        _STUDENT,
    ),
    Mutation(
        "a layer's attention crosses documents",
        "mistill/pytorch/layers.py",
        "return (near & same)[:, None]",
        "return (near | same)[:, None]",
        _LAYERS,
    ),
    Mutation(
        "a sliding window is a position too wide",
        "mistill/pytorch/layers.py",
        "(distance < window)",
        "(distance <= window)",
        _LAYERS,
    ),
    # --- the training loop ----------------------------------------------------------------------
    Mutation(
        "the first step of the warm-up learns nothing",
        "mistill/training/schedule.py",
        "(step + 1) / rising",
        "step / rising",
        _SCHEDULE,
    ),
    Mutation(
        "the learning rate rises along the cosine",
        "mistill/training/schedule.py",
        "(1 + math.cos(",
        "(1 - math.cos(",
        _SCHEDULE,
    ),
    Mutation(
        "the last step has a learning rate of 0",
        "mistill/training/schedule.py",
        "(step - rising) / (steps - rising)",
        "(step - rising) / max(1, steps - rising - 1)",
        _SCHEDULE,
    ),
    Mutation(
        "every epoch reads its blocks in the same order",
        "mistill/training/schedule.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng(seed)",
        _SCHEDULE,
    ),
    Mutation(
        "weight decay shrinks the embedding",
        "mistill/training/optimizers.py",
        "parameter.ndim >= 2 and id(parameter) not in tables",
        "parameter.ndim >= 2",
        _STEP,
    ),
    # --- GPTQ -----------------------------------------------------------------------------------
    Mutation(
        "the Hessian is factored in the order of the walk, not in its reverse",
        "quantize/gptq/gptq.py",
        "column_order(diagonal, size, settings.order).flip(0)",
        "column_order(diagonal, size, settings.order)",
        _GPTQ,
    ),
    Mutation(
        "act-order walks the smallest inputs first",
        "quantize/gptq/gptq.py",
        "return diagonal.argsort(descending=True, stable=True)",
        "return diagonal.argsort(descending=False, stable=True)",
        _GPTQ,
    ),
    Mutation(
        "errors are made up for with the wrong sign",
        "quantize/gptq/gptq.py",
        "moved = self._E[k] + pull / length",
        "moved = self._E[k] - pull / length",
        _GPTQ,
    ),
    Mutation(
        "GPTAQ reads the cross moments transposed",
        "quantize/gptq/gptq.py",
        "Z = rearranged(C, columns).T.mul_(_ASYMMETRY)",
        "Z = rearranged(C, columns).mul_(_ASYMMETRY)",
        _GPTQ,
    ),
    Mutation(
        "act-order's index of groups is counted backwards",
        "quantize/gptq/gptq.py",
        "g_idx = (columns - 1 - back.numpy()) // size",
        "g_idx = back.numpy() // size",
        _GPTQ,
    ),
    Mutation(
        "damping does not grow with the Hessian",
        "mistill/pytorch/factor.py",
        "diagonal + damping * diagonal.mean()",
        "diagonal + damping",
        _GPTQ,
    ),
    Mutation(
        "asymmetric zero points have the wrong sign",
        "mistill/weights/grid.py",
        "torch.round(low * -share / scales)",
        "torch.round(low * share / scales)",
        _GRID,
    ),
    Mutation(
        "symmetric zero points are one too low",
        "mistill/weights/grid.py",
        "2.0 ** (kind.bits - 1)",
        "2.0 ** (kind.bits - 1) - 1",
        _GRID,
    ),
    Mutation(
        "zero points are stored less one in gptq_v2",
        "mistill/weights/gptq_layout.py",
        'if checkpoint_format == "gptq":\n        zeros = less_one',
        'if checkpoint_format == "gptq_v2":\n        zeros = less_one',
        _PACKING,
    ),
    Mutation(
        "zero points are read as they stand in gptq",
        "mistill/weights/gptq_layout.py",
        'if checkpoint_format == "gptq":\n        zero_words',
        'if checkpoint_format == "gptq_v2":\n        zero_words',
        _PACKING,
    ),
    Mutation(
        "scales are looked up without the index of groups",
        "mistill/weights/gptq_layout.py",
        "scales = self.scales.astype(np.float32)[:, self.g_idx]",
        "scales = self.scales.astype(np.float32)[:, np.sort(self.g_idx)]",
        _PACKING,
    ),
    Mutation(
        "the two halves of an NF4 byte are swapped",
        "quantize/nf4/nf4_codec.py",
        "(pairs[:, 0] << 4).bitwise_or_(pairs[:, 1])",
        "(pairs[:, 1] << 4).bitwise_or_(pairs[:, 0])",
        _NF4,
    ),
    Mutation(
        "double quantization forgets the mean of the scales",
        "quantize/nf4/nf4_codec.py",
        "_encode_scales(scales - mean)",
        "_encode_scales(scales)",
        _NF4,
    ),
    # --- the ONNX graph and its engine ----------------------------------------------------------
    Mutation(
        "RoPE's cosine and sine are swapped",
        "export/weights/architecture.py",
        "return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)",
        "return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)",
        _GRAPH,
    ),
    Mutation(
        "RoPE turns the other way in the portable graph",
        "export/graph/portable_decoder.py",
        '"Sub",\n                [products["first", "cosine"], products["second", "sine"]]',
        '"Add",\n                [products["first", "cosine"], products["second", "sine"]]',
        _PORTABLE,
    ),
    Mutation(
        "a rewound cache keeps a token too many",
        "mistill/engine/key_value_cache.py",
        "del self.ids[count:]",
        "del self.ids[count + 1 :]",
        _ENGINE,
    ),
    Mutation(
        "a rewound ring buffer keeps positions that were dropped",
        "mistill/engine/key_value_cache.py",
        "if back > 0 and self._rows(count) != self._rows(len(self.ids)) - back:",
        "if back < 0:",
        ("tests/export/graph/test_ring.py",),
    ),
    Mutation(
        "the common prefix of two texts is a token too long",
        "mistill/engine/key_value_cache.py",
        "return next(index for index in range(shorter) if first[index] != second[index])",
        "return 1 + next(index for index in range(shorter) if first[index] != second[index])",
        _ENGINE,
    ),
    Mutation(
        "a draft token that was not chosen is kept",
        "mistill/engine/speculation.py",
        "token != drafted.token:",
        "token < 0:",
        _SPECULATION,
    ),
    Mutation(
        "draft tokens are accepted with q / p",
        "mistill/engine/sampling.py",
        "generator.random() * q < p",
        "generator.random() * p < q",
        _SAMPLING,
    ),
    Mutation(
        "rejected draft tokens are drawn anew from p, not from what p has over q",
        "mistill/engine/sampling.py",
        "np.maximum(over[at_ours] - odds[at_theirs], 0)",
        "np.maximum(over[at_ours], 0)",
        _SAMPLING,
    ),
    Mutation(
        "nucleus sampling keeps every token",
        "mistill/engine/sampling.py",
        "mass = p * odds.sum(dtype=np.float64)",
        "mass = odds.sum(dtype=np.float64)",
        _SAMPLING,
    ),
    # --- measuring ------------------------------------------------------------------------------
    Mutation(
        "measured KL is weighted by the model, not by the reference",
        "mistill/measures/kl.py",
        ".mul_(self.weights)",
        ".mul_(other.weights)",
        _KL,
    ),
    Mutation(
        "measured KL forgets one normalizer",
        "mistill/measures/kl.py",
        "expected - self.log_total + other.log_total.to(expected.device)",
        "expected - self.log_total + self.log_total.to(expected.device)",
        _KL,
    ),
    # --- healing --------------------------------------------------------------------------------
    Mutation(
        "a healed layer stands for itself alone, not for the gap behind it",
        "distill/healing/walk.py",
        "(layer - 1 for layer in origin.layers[1:])",
        "(layer for layer in origin.layers[:-1])",
        _HEALING,
    ),
    Mutation(
        "tokens with massive activations decide a fit",
        "distill/healing/walk.py",
        "1 / target.square().mean(dim=-1)",
        "1 + 0 * target.square().mean(dim=-1)",
        _HEALING,
    ),
    Mutation(
        "a healed layer's feed-forward part does not see its attention",
        "distill/healing/walk.py",
        "batch.hidden = batch.hidden + attention(x)",
        "batch.hidden = batch.hidden + 0 * attention(x)",
        _HEALING,
    ),
    Mutation(
        "padding is fitted like text",
        "distill/healing/walk.py",
        "rows = batch.present & (judges",
        "rows = (batch.documents >= -1) & (judges",
        _HEALING,
    ),
    Mutation(
        "the tokens that judged a ridge are not fitted afterwards",
        "distill/healing/least_squares.py",
        "        for x, r in self._left_out:\n            self._sum(x, r)\n",
        "",
        _HEALING,
    ),
    Mutation(
        "the ridge grows with the size of the text",
        "distill/healing/least_squares.py",
        "damped_factor(self._H, ridge)",
        "damped_factor(self._H, ridge * self._numbers / 1000)",
        _HEALING,
    ),
    # --- tuning ---------------------------------------------------------------------------------
    Mutation(
        "an adapter is taken away from its matrix",
        "mistill/training/adapters.py",
        "total = weight + self.scale * (self.up @ self.down)",
        "total = weight - self.scale * (self.up @ self.down)",
        ("tests/mistill/training/test_adapters.py",),
    ),
    Mutation(
        "DoRA's rows keep the length that the sum has",
        "mistill/training/adapters.py",
        "total * (self.magnitude / length)[:, None]",
        "total * self.magnitude[:, None]",
        ("tests/mistill/training/test_adapters.py",),
    ),
    Mutation(
        "what PiSSA started with is added again",
        "mistill/training/adapters.py",
        "torch.cat([self.up, -start.up], dim=1)",
        "torch.cat([self.up, start.up], dim=1)",
        ("tests/mistill/training/test_adapters.py",),
    ),
    Mutation(
        "four-bit weights are repacked where the processor likes it",
        "mistill/pytorch/four_bit.py",
        "layer.support_avx512bf16_for_cpu = False",
        "layer.support_avx512bf16_for_cpu |= False",
        ("tests/mistill/pytorch/test_four_bit.py",),
    ),
    Mutation(
        "the divisions by accelerate are not undone in tuning",
        "tune/supervision/step.py",
        "accelerator.backward(result.loss * share)",
        "accelerator.backward(result.loss)",
        ("tests/tune/supervision/test_step.py",),
    ),
    Mutation(
        "documents of a block share one length of noise",
        "tune/supervision/noise.py",
        "starts = torch.nonzero(positions == 0)[:, 0]",
        "starts = torch.zeros(1, dtype=torch.int64)",
        ("tests/tune/supervision/test_step.py",),
    ),
    Mutation(
        "a prompt stands on both sides",
        "mistill/training/training_text.py",
        "together.setdefault(index if groups is None else groups[index], [])",
        "together.setdefault(index, [])",
        ("tests/tune/supervision/test_tuned_folder.py",),
    ),
    Mutation(
        "what was trained over four bits is merged into the weights before them twice",
        "tune/trainers/merged_folder.py",
        "        if through_nf4 is not None and module",
        "        if through_nf4 is None and module",
        ("tests/tune/supervision/test_tuned_folder.py",),
    ),
    Mutation(
        "a run with patience ends one evaluation late",
        "mistill/training/loop.py",
        "waited >= options.patience * options.evaluate_every",
        "waited > options.patience * options.evaluate_every",
        ("tests/tune/supervision/test_tuned_folder.py",),
    ),
    Mutation(
        "the way to merge that text costs more is taken",
        "quantize/conversions/merge_measuring.py",
        "chosen = min(ways, key=lambda name: ways[name].cross_entropy)",
        "chosen = max(ways, key=lambda name: ways[name].cross_entropy)",
        ("tests/quantize/conversions/test_merge_measuring.py",),
    ),
)
