// Python definitions and docstrings.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "branch.h"
#include "gate.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using namespace teacache;

NB_MODULE(_ext, m) {
  m.doc() = "C++ ops of mlx_teacache_fast; use them through mlx_teacache_fast.ops.";
  nb::module_::import_("mlx.core");

  m.def(
      "gate",
      [](const mx::array& x, const std::optional<mx::array>& shift, const std::optional<mx::array>& scale,
         const mx::array& anchor, const std::vector<std::vector<mx::array>>& residuals, const mx::array& weights,
         const mx::array& state, const mx::array& force, const std::vector<float>& coefficients, float threshold,
         std::optional<std::pair<float, float>> calibrated_range, int max_consecutive_skips, float eps,
         mx::StreamOrDevice s) {
        auto out = gate(
            x, shift, scale, anchor, residuals, weights, state, force, coefficients, threshold, calibrated_range,
            max_consecutive_skips, eps, s);
        return std::make_tuple(out.modulated, out.reused, out.state);
      },
      "x"_a, "shift"_a.none(), "scale"_a.none(), "anchor"_a, nb::kw_only(), "residuals"_a, "weights"_a, "state"_a,
      "force"_a, "coefficients"_a, "threshold"_a, "calibrated_range"_a = nb::none(), "max_consecutive_skips"_a = 8,
      "eps"_a = 1e-6f, "stream"_a = nb::none(),
      nb::sig(
          "def gate(x: mlx.core.array, shift: mlx.core.array | None, scale: mlx.core.array | None, "
          "anchor: mlx.core.array, *, "
          "residuals: collections.abc.Sequence[collections.abc.Sequence[mlx.core.array]], "
          "weights: mlx.core.array, state: mlx.core.array, force: mlx.core.array, "
          "coefficients: collections.abc.Sequence[float], threshold: float, "
          "calibrated_range: tuple[float, float] | None = None, max_consecutive_skips: int = 8, "
          "eps: float = 1e-6, stream: mlx.core.Stream | mlx.core.Device | None = None) "
          "-> tuple[mlx.core.array, list[mlx.core.array], mlx.core.array]"),
      R"pbdoc(
        TeaCache's gate: may this denoising step reuse what the transformer's body added last time?

        One pass over the data computes the input that block 0 modulates, its relative L1 distance to the step
        before, the decision, and what the step's output is if the body is skipped:

            modulated = layer_norm(x) * (1 + scale) + shift         rounded to the result's dtype at each operation
                      = x                                           where shift and scale are None
            rel_l1    = mean(|modulated - anchor|) / mean(|anchor|) summed in float32, in a fixed order
            reused[b] = x + sum_k weights[b, k] * residuals[b][k]   summed in float32, rounded once

        Everything scalar is in ``state``, which goes in and comes out, so that a step is a pure function and can live
        inside ``mx.compile``: start with ``mx.zeros(8)``, and pass ``modulated`` as the next step's ``anchor``.
        Source: TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108); safeguards as in mlx-teacache 0.14.1.

        Args:
            x (array): Block 0's input, ``(B, S, D)``; float32, float16 or bfloat16. Where ``shift`` and ``scale`` are
                None the modulated input itself, or any other signal: for blocks with another norm.
            shift (array, optional): adaLN shift, ``(B, D)``, ``(B, 1, D)`` or ``(B, S, D)``; floating.
            scale (array, optional): adaLN scale, shape and dtype of ``shift``.
            anchor (array): The last step's ``modulated``; ignored while ``state`` has no anchor.
            residuals (list of list of array): For each of up to 2 branches (classifier-free guidance) 1 to 4 terms,
                each of ``x``'s shape and all of one floating dtype. Without a branch nothing is reused, only decided:
                so it must be where ``shift`` and ``scale`` are None, since residuals are added to block 0's input.
            weights (array): float32 ``(branches, terms)``; ``(0, 0)`` without a branch.
            state (array): float32 ``(8,)``: skip (1 or 0), kind (0 computed, 1 forced, 2 skipped, 3 numerical miss),
                rel_l1, predicted (both NaN where not measured), accumulated, consecutive skips, has_anchor,
                has_residual.
            force (array): int32 scalar: 0 gated, 1 first steps, which compute and advance the anchor, 2 last steps,
                which compute.
            coefficients (list of float): Polynomial of ``rel_l1``, five numbers, fourth degree first.
            threshold (float): Skip while the accumulated polynomial stays below it; 0 turns the gate off.
            calibrated_range (tuple of float, optional): ``(lo, hi)``: ``rel_l1`` is clamped into it for the
                polynomial, and a step above ``hi`` computes.
            max_consecutive_skips (int): A step computes after so many skips.
            eps (float): Of the layer norm.
            stream (Stream or Device, optional): Where it runs: the CPU, a Mac's GPU or NVIDIA's.

        Returns:
            tuple: ``modulated`` (``x``'s shape, dtype of ``layer_norm(x) * scale``), ``reused`` (one array for each
            branch, ``x``'s shape, dtype of ``x + residual``) and the new ``state``. Where ``shift`` and ``scale``
            are None, ``modulated`` is ``x``.

        Raises:
            ValueError: An argument has the wrong shape, dtype or value.
            RuntimeError: The stream is a GPU's, and there is none.
      )pbdoc");

  nb::class_<CapturedGraph>(m, "CapturedGraph", R"pbdoc(
        A body traced for fixed shapes and dtypes: a pure function of its inputs that runs without Python.

        Arrays that do not depend on the inputs (weights) are evaluated by the trace and kept as constants, with ``fold``.
        Made by ``ops.Body``.
      )pbdoc")
      .def(
          "__init__",
          [](CapturedGraph* self, const nb::callable& fn, const std::vector<mx::array>& inputs, bool fold) {
            std::vector<mx::Shape> shapes;
            std::vector<mx::Dtype> dtypes;
            for (auto& in : inputs) {
              shapes.push_back(in.shape());
              dtypes.push_back(in.dtype());
            }
            auto call = [&fn](const Arrays& placeholders) {
              nb::list args;
              for (auto& p : placeholders) {
                args.append(p);
              }
              nb::object returned = fn(*nb::tuple(args));
              Arrays outputs;
              if (!(nb::isinstance<nb::list>(returned) || nb::isinstance<nb::tuple>(returned)) ||
                  !nb::try_cast(returned, outputs) || outputs.empty()) {
                std::string text = nb::cast<std::string>(nb::str(returned.type()));
                throw std::invalid_argument("[branch] the body must return a list of one or more arrays, got " + text);
              }
              return outputs;
            };
            new (self) CapturedGraph(call, shapes, dtypes, fold);
          },
          "fn"_a, "inputs"_a, "fold"_a = true,
          nb::sig(
              "def __init__(self, fn: collections.abc.Callable[..., collections.abc.Sequence[mlx.core.array]], "
              "inputs: collections.abc.Sequence[mlx.core.array], fold: bool = True) -> None"))
      .def(
          "__call__",
          [](const CapturedGraph& g, const std::vector<mx::array>& inputs) {
            check_inputs(g, inputs);
            return g(inputs);
          },
          "inputs"_a,
          nb::sig("def __call__(self, inputs: collections.abc.Sequence[mlx.core.array]) -> list[mlx.core.array]"),
          "The body's outputs for inputs of the traced shapes and dtypes; nothing is evaluated.")
      .def_prop_ro(
          "output_shapes",
          [](const CapturedGraph& g) {
            nb::list shapes;
            for (auto& shape : g.output_shapes()) {
              nb::list dims;
              for (auto dim : shape) {
                dims.append(dim);
              }
              shapes.append(nb::tuple(dims));
            }
            return shapes;
          },
          nb::sig("def output_shapes(self) -> list[tuple[int, ...]]"))
      .def_prop_ro(
          "output_dtypes", [](const CapturedGraph& g) { return g.output_dtypes(); },
          nb::sig("def output_dtypes(self) -> list[mlx.core.Dtype]"));

  m.def(
      "branch", &branch, "skip"_a, "on_skip"_a, "body"_a, "inputs"_a,
      nb::sig(
          "def branch(skip: mlx.core.array, on_skip: collections.abc.Sequence[mlx.core.array], "
          "body: CapturedGraph, inputs: collections.abc.Sequence[mlx.core.array]) -> list[mlx.core.array]"));

  m.def(
      "decide", &decide, "skip"_a, nb::sig("def decide(skip: mlx.core.array) -> mlx.core.array"),
      R"pbdoc(
        A decision as ``branch`` takes it, read on the host once in an evaluation, for all branches on it.

        ``branch`` does this itself. Several branches of one step need it where they run outside ``mx.compile``, which
        would merge their reads: else the second branch waits for the whole body of the first.

        Args:
            skip (array): Bool scalar, or the state that ``gate`` returns (float32 ``(8,)``).

        Returns:
            array: Bool scalar.

        Raises:
            ValueError: ``skip`` is neither.
      )pbdoc");

  m.def(
      "gpu_supported", [] { return gpu() != Gpu::none; }, nb::sig("def gpu_supported() -> bool"),
      "Whether ``gate`` and ``branch`` run on the GPU that MLX has here.");

  m.def(
      "counters",
      [] {
        auto& c = branch_counters();
        nb::dict counts;
        counts["reads"] = c.reads.load();
        counts["computed"] = c.computed.load();
        counts["reused"] = c.reused.load();
        return counts;
      },
      nb::sig("def counters() -> dict[str, int]"),
      R"pbdoc(
        What ``branch`` did in this process: decisions read on the host, bodies computed, bodies reused.
      )pbdoc");
  m.def(
      "reset_counters",
      [] {
        auto& c = branch_counters();
        c.reads = c.computed = c.reused = 0;
      },
      nb::sig("def reset_counters() -> None"), "Set the counters of ``branch`` to zero.");
}
