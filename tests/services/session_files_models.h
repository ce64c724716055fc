// Models that the files of tests/formats/testdata fit.
#ifndef PAGETIDE_TESTS_SERVICES_SESSION_FILES_MODELS_H_
#define PAGETIDE_TESTS_SERVICES_SESSION_FILES_MODELS_H_

#include <string>
#include <vector>

#include "core/model.h"

namespace pagetide {

// The geometry of the tiny models behind tests/formats/testdata.
inline ModelSpec SpecOf(const std::string& name, uint32_t layers, uint32_t kv_heads, uint32_t dim,
                        DataType k = DataType::kF16, DataType v = DataType::kF16) {
  ModelSpec spec;
  spec.name = name;
  spec.geometry.page_tokens = 4;
  LayerGroupSpec group;
  for (uint32_t l = 0; l < layers; ++l) group.layers.push_back(l);
  group.kv_heads = kv_heads;
  group.k_dim = group.v_dim = dim;
  group.k_type = k;
  group.v_type = v;
  spec.geometry.groups.push_back(group);
  return spec;
}
inline ModelSpec LlamaSpec() {
  return SpecOf("llama", 2, 1, 32);
}

inline std::vector<uint32_t> LlamaTokens() {
  std::vector<uint32_t> tokens;
  for (uint32_t i = 0; i < 20; ++i) tokens.push_back((7 * i + 3) % 64);
  return tokens;
}

// testdata/make_llama_cpp_states.py: every sixth layer is full, the window of the others is 8.
inline ModelSpec InterleavedSpec(uint32_t window) {
  ModelSpec spec = SpecOf("iswa", 5, 1, 32);
  LayerGroupSpec full = spec.geometry.groups[0];
  full.layers = {5};
  spec.geometry.groups[0].kind = LayerGroupSpec::Kind::kWindow;
  spec.geometry.groups[0].window_type = LayerGroupSpec::WindowType::kStandard;
  spec.geometry.groups[0].window_tokens = window;
  spec.geometry.groups.push_back(full);
  return spec;
}

inline ModelSpec WindowSpec(uint32_t layers, LayerGroupSpec::WindowType type, uint32_t window) {
  ModelSpec spec = SpecOf("window", layers, 2, 8);
  spec.geometry.groups[0].kind = LayerGroupSpec::Kind::kWindow;
  spec.geometry.groups[0].window_type = type;
  spec.geometry.groups[0].window_tokens = window;
  return spec;
}

// Of 8 rows, of which the first two stay.
inline ModelSpec RingSpec() {
  ModelSpec spec = WindowSpec(2, LayerGroupSpec::WindowType::kRing, 8);
  spec.geometry.groups[0].keep_tokens = 2;
  return spec;
}

// MLX's quantised rows: 2 heads of 64 elements in 4 bits, with scales and biases, of K and of V.
inline ModelSpec PackedSpec() {
  ModelSpec spec = SpecOf("packed", 1, 2, 64);
  LayerGroupSpec& group = spec.geometry.groups[0];
  group.kv_heads = group.k_dim = group.v_dim = 0;
  group.packed_row_bytes = 2 * 2 * (32 + 4 + 4);
  return spec;
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_SERVICES_SESSION_FILES_MODELS_H_
