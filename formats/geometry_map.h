// Which rows of a saved state are which rows of a model, and what a model's state looks like in a
// foreign format. What differs is said with both sides: FAILED_PRECONDITION (MODEL_MISMATCH).
// Pure functions and values; thread-safe.
#ifndef PAGETIDE_FORMATS_GEOMETRY_MAP_H_
#define PAGETIDE_FORMATS_GEOMETRY_MAP_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/geometry.h"
#include "core/sequence_rows.h"
#include "formats/llama_cpp.h"
#include "formats/mlx_cache.h"
#include "formats/sequence_state.h"

namespace pagetide {

// How a format divides a model's layers into blocks.
enum class BlockRule : uint8_t {
  // llama.cpp: all layers in one body, or full layers in the first and window layers in the second.
  kByKind = 1,
  // MLX: layers that hold the same rows; LayerShape::number counts the model's layers.
  kByNumber = 2,
};

// FAILED_PRECONDITION (CANNOT_EXPRESS) for what no foreign format can hold: recurrent and opaque
// groups, scale planes, shards, rows in a rotated basis.
absl::Status CheckForeignGeometry(const PageGeometry& geometry);

// What LlamaCppState::Parse has to know of the model. `version` of the file, or 0.
LlamaCppHints LlamaCppHintsFor(const PageGeometry& geometry, uint32_t version);

// FAILED_PRECONDITION (MODEL_MISMATCH) unless a sequence of `num_tokens` tokens can go on with
// these rows of a layer group, ascending: with all of them or, behind a window, at least with the
// last one and those that the next token can attend to.
absl::Status CheckHeldRows(const PageGeometry& geometry, uint32_t group,
                           std::span<const RowSpan> held, uint64_t num_tokens);

// The rows of a state in a model's order: by group, layer and position.
class StateMap {
 public:
  // FAILED_PRECONDITION (MODEL_MISMATCH): layers, widths, types; rows that are not each at another
  // of the positions 0…num_tokens-1 (positions edited); rows that CheckHeldRows refuses. `state`
  // outlives the map.
  static absl::StatusOr<StateMap> Create(const SequenceState* state, BlockRule rule,
                                         const PageGeometry& geometry, uint64_t num_tokens);

  // [group]: the rows that the state has, ascending.
  std::span<const std::vector<RowSpan>> held() const { return held_; }
  // Rows [first, first + count) by position; out.size() is what the geometry says of them. Rows
  // that the state has not are zeros.
  absl::Status ReadRows(const RowReader& rows, uint32_t group, uint32_t layer, RowKind kind,
                        uint64_t first, uint64_t count, std::span<std::byte> out) const;

 private:
  struct Source {
    size_t block = 0;
    size_t layer = 0;
    bool joins_k_and_v = false;  // a packed row holds both
  };
  absl::Status ReadKind(const RowReader& rows, const Source& source, RowKind kind, uint64_t first,
                        uint64_t count, std::span<std::byte> out) const;

  const SequenceState* state_ = nullptr;
  std::vector<std::vector<Source>> sources_;  // [group][layer]
  std::vector<std::vector<RowSpan>> held_;    // [group]
  // [block][position] → row, or kNoRow; empty where row n is at position n.
  std::vector<std::vector<uint32_t>> rows_at_;
};

// The state of tokens of a model as llama.cpp has it: full layers whole, window layers with the
// rows that are not masked for the last token, as far as they are held. `places[block][layer]` says
// which layer of the model that is.
struct ModelLayer {
  uint32_t group = 0;
  uint32_t layer = 0;
};
struct DescribedState {
  SequenceState state;
  std::vector<std::vector<ModelLayer>> places;
};
// `held`: [group], ascending.
absl::StatusOr<DescribedState> DescribeForLlamaCpp(const PageGeometry& geometry,
                                                   std::vector<uint32_t> tokens,
                                                   std::span<const std::vector<RowSpan>> held);
// FAILED_PRECONDITION (MODEL_MISMATCH) unless the windows of layers that dropped rows are the
// model's.
absl::Status CheckMlxWindows(const MlxCache& cache, const PageGeometry& geometry);

// Layers of KVCache for ComposeMlxLayout; places has one block.
struct DescribedMlx {
  std::vector<MlxComposeOptions::Layer> layers;
  std::vector<std::vector<ModelLayer>> places;
};
absl::StatusOr<DescribedMlx> DescribeForMlx(const PageGeometry& geometry);
// The places of a layout that an import gave. FAILED_PRECONDITION as StateMap::Create.
absl::StatusOr<std::vector<std::vector<ModelLayer>>> PlacesOf(const SequenceState& state,
                                                              const PageGeometry& geometry,
                                                              uint64_t num_tokens);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_GEOMETRY_MAP_H_
