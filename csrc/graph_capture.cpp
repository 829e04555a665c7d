// A traced body as a pure function of its inputs, replayed without Python.
#include "graph_capture.h"

#include <string>
#include <unordered_map>
#include <unordered_set>

#include "forward_only.h"
#include "mlx/compile.h"
#include "mlx/primitives.h"

namespace teacache {

namespace {

bool is_lazy(const mx::array& a) {
  return a.status() == mx::array::Status::unscheduled;
}

// Visits what roots depend on, inputs before users, once for each primitive; stops at evaluated arrays and at `leaves`.
// A loop instead of recursion: a body can be thousands of nodes deep.
template <typename Visit>
void visit_lazy(const Arrays& roots, const std::unordered_set<std::uintptr_t>& leaves, Visit&& visit) {
  std::unordered_set<std::uintptr_t> seen = leaves;
  std::vector<std::pair<mx::array, size_t>> stack;
  auto enter = [&](const mx::array& a) {
    if (is_lazy(a) && seen.insert(a.id()).second) {
      for (auto& sibling : a.siblings()) {
        seen.insert(sibling.id());
      }
      stack.emplace_back(a, 0);
    }
  };
  for (auto& root : roots) {
    enter(root);
    while (!stack.empty()) {
      auto& [a, next] = stack.back();
      if (next < a.inputs().size()) {
        mx::array input = a.inputs()[next++];
        enter(input);
      } else {
        mx::array done = a;
        stack.pop_back();
        visit(done);
      }
    }
  }
}

std::unordered_set<std::uintptr_t> ids(const Arrays& arrays) {
  std::unordered_set<std::uintptr_t> set;
  for (auto& a : arrays) {
    set.insert(a.id());
  }
  return set;
}

// As visit_lazy, but for `inputs`. Tells visit of each array whether it depends on them, which `dependent` remembers.
template <typename Visit>
void visit_dependents(
    const Arrays& inputs, const Arrays& roots, std::unordered_set<std::uintptr_t>& dependent, Visit&& visit) {
  visit_lazy(roots, ids(inputs), [&](const mx::array& a) {
    bool depends = false;
    for (auto& in : a.inputs()) {
      depends |= dependent.count(in.id()) > 0;
    }
    if (depends) {
      for (auto& out : a.outputs()) {
        dependent.insert(out.id());
      }
    }
    visit(a, depends);
  });
}

// A cast or a view: kept as a node, so that a weight which is cast for a product is not kept in both dtypes.
bool is_transient(const mx::array& a) {
  static const std::unordered_set<std::string> names{"AsType",  "Broadcast", "ExpandDims", "Flatten",
                                                     "Reshape", "Squeeze",   "Transpose",  "Unflatten"};
  return a.has_primitive() && names.count(a.primitive().name()) > 0;
}

// Refuses placeholders of another trace, and with `fold` evaluates what does not depend on `inputs`: rebuilding such a
// graph would compute it again at every step, and one that is still lazy while an enclosing evaluation holds it too
// would be evaluated twice at once. Weights that have yet to be read from a file are read in any case, once.
void freeze_constants(const Arrays& inputs, const Arrays& outputs, bool fold) {
  auto dependent = ids(inputs);
  Arrays constants, loads;
  auto freeze = [&](mx::array a) {
    while (is_lazy(a) && !dependent.count(a.id())) {
      if (!is_transient(a)) {
        constants.push_back(a);
        return;
      }
      a = mx::array(a.inputs()[0]);
    }
  };
  for (size_t i = 0; i < outputs.size(); i++) {
    visit_dependents(inputs, {outputs[i]}, dependent, [&](const mx::array& a, bool depends) {
      if (!a.has_primitive()) {
        reject(
            "[branch] the body's output ", i, " depends on an array of shape ", a.shape(),
            " that belongs to an enclosing trace: pass that array in inputs instead of closing over it");
      }
      if (depends) {
        for (auto& in : a.inputs()) {
          freeze(in);
        }
      } else if (std::string(a.primitive().name()) == "Load") {
        loads.push_back(a);
      }
    });
    freeze(outputs[i]);
  }
  mx::eval(fold ? constants : loads);
}

}  // namespace

CapturedGraph::CapturedGraph(
    const std::function<Arrays(const Arrays&)>& fn,
    const std::vector<mx::Shape>& shapes,
    const std::vector<mx::Dtype>& dtypes,
    bool fold)
    : input_shapes_(shapes), input_dtypes_(dtypes), input_read_(shapes.size(), false) {
  Arrays placeholders;
  for (size_t i = 0; i < shapes.size(); i++) {
    placeholders.emplace_back(shapes[i], dtypes[i], nullptr, Arrays{});
  }
  // mx::compile is used for one call: it traces fn on tracers of its own, simplifies, fuses, and hands back the result
  // over the placeholders. Recording that, instead of keeping the compiled function, leaves nothing of MLX's compile
  // cache to own: a compiled function that is destroyed while the cache erases an outer one locks the cache twice.
  Arrays with_siblings;
  auto note_siblings = [&](const Arrays& inputs, const Arrays& outputs) {
    auto dependent = ids(inputs);
    visit_dependents(inputs, outputs, dependent, [&](const mx::array& a, bool depends) {
      if (depends && !a.siblings().empty()) {  // others are the caller's own, a lazy weight's for example
        with_siblings.push_back(a);
      }
    });
  };
  std::function<Arrays(const Arrays&)> traced = [&](const Arrays& tracers) {
    Arrays outputs = fn(tracers);
    freeze_constants(tracers, outputs, fold);
    note_siblings(tracers, outputs);
    return outputs;
  };
  Arrays outputs = mx::compile(std::move(traced))(placeholders);
  record(placeholders, outputs);
  note_siblings(placeholders, outputs);
  // Outputs of one primitive hold each other. MLX breaks that when it destroys a graph, but not in every order in which
  // it meets them (mx.split's outputs with a reader each): then the graph and the weights in it are never freed. A
  // fused kernel keeps the traced graph before it, so the same is done there; such arrays are never fused themselves.
  for (auto& a : with_siblings) {
    a.detach();
  }
}

void CapturedGraph::record(const Arrays& placeholders, const Arrays& outputs) {
  std::unordered_map<std::uintptr_t, int> slot_of;
  for (size_t i = 0; i < placeholders.size(); i++) {
    slot_of.emplace(placeholders[i].id(), int(i));
  }
  const auto input_ids = ids(placeholders);

  // Constants first, because their slots come before those of the nodes.
  auto note_constant = [&](const mx::array& a) {
    if (!is_lazy(a) && slot_of.emplace(a.id(), int(placeholders.size() + constants_.size())).second) {
      constants_.push_back(a);
    }
  };
  Arrays order;
  visit_lazy(outputs, input_ids, [&](const mx::array& a) {
    order.push_back(a);
    for (auto& in : a.inputs()) {
      note_constant(in);
    }
  });
  for (auto& out : outputs) {
    note_constant(out);
  }

  int next_slot = int(placeholders.size() + constants_.size());
  auto slot = [&](const mx::array& a) {
    int i = slot_of.at(a.id());
    if (i < int(input_read_.size())) {
      input_read_[i] = true;
    }
    return i;
  };
  for (auto& a : order) {
    Node node{a.primitive_ptr(), {}, {}, {}};
    streams_.insert(a.primitive().stream());
    for (auto& in : a.inputs()) {
      node.inputs.push_back(slot(in));
    }
    for (auto& out : a.outputs()) {
      node.shapes.push_back(out.shape());
      node.dtypes.push_back(out.dtype());
      slot_of.emplace(out.id(), next_slot++);
    }
    nodes_.push_back(std::move(node));
  }
  for (auto& out : outputs) {
    if (!output_stream_ && is_lazy(out) && out.has_primitive()) {
      output_stream_ = out.primitive().stream();
    }
    output_slots_.push_back(slot(out));
    output_shapes_.push_back(out.shape());
    output_dtypes_.push_back(out.dtype());
  }
}

Arrays CapturedGraph::operator()(const Arrays& inputs) const {
  Arrays slots;
  slots.reserve(inputs.size() + constants_.size() + nodes_.size());
  slots.insert(slots.end(), inputs.begin(), inputs.end());
  slots.insert(slots.end(), constants_.begin(), constants_.end());
  for (auto& node : nodes_) {
    Arrays node_inputs;
    node_inputs.reserve(node.inputs.size());
    for (int i : node.inputs) {
      node_inputs.push_back(slots[i]);
    }
    if (node.shapes.size() == 1) {
      slots.emplace_back(node.shapes[0], node.dtypes[0], node.primitive, std::move(node_inputs));
    } else {
      auto made = mx::array::make_arrays(node.shapes, node.dtypes, node.primitive, node_inputs);
      slots.insert(slots.end(), made.begin(), made.end());
    }
  }
  Arrays outputs;
  for (int i : output_slots_) {
    outputs.push_back(slots[i]);
  }
  return outputs;
}

}  // namespace teacache
