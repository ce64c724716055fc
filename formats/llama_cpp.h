// Sequence states of llama.cpp: the file of llama_state_seq_save_file ("ggsq", versions 2 and 3),
// the memory form of llama_state_seq_get_data, and the bare body that both contain. The format is
// specified in docs/formats/llama_cpp.md.
//
// What the format does not record, and the caller must know: which layers the rows belong to, the
// RoPE that is in the K rows, and whether quantised rows are stored in a rotated basis.
#ifndef PAGETIDE_FORMATS_LLAMA_CPP_H_
#define PAGETIDE_FORMATS_LLAMA_CPP_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "formats/sequence_state.h"

namespace pagetide {

inline constexpr uint32_t kLlamaCppFileMagic = 0x67677371;  // "ggsq"
inline constexpr uint32_t kLlamaCppMemoryMagic = 0xaf143cd8;

enum class LlamaCppForm : uint8_t {
  kFile = 1,    // magic, version, tokens, body
  kMemory = 2,  // magic, sequence, body
  kBody = 3,    // what cores before the memory form's magic wrote
};

// All of a state that is not tokens, positions or rows.
struct LlamaCppLayout {
  LlamaCppForm form = LlamaCppForm::kFile;
  uint32_t version = 2;  // of the file form
  int32_t sequence_id = 0;
  // Bytes behind each cell's position: 0; 8 (x, y) for multi-axis RoPE; 12 (x, y, token) from
  // version 3 on for multi-axis RoPE and models that hash token n-grams.
  uint32_t cell_ext_bytes = 0;
  // One body for a plain cache; two (full layers, window layers) for an interleaved one.
  struct Body {
    // A context that is not unified writes one stream a sequence, of which one has cells.
    uint32_t num_streams = 1;
    uint32_t stream = 0;
    bool v_transposed = false;
    // [rows][cell_ext_bytes].
    std::string cell_ext;
    friend bool operator==(const Body&, const Body&) = default;
  };
  std::vector<Body> bodies;
  friend bool operator==(const LlamaCppLayout&, const LlamaCppLayout&) = default;
};

// What the bytes alone do not tell.
struct LlamaCppHints {
  // False for latent (MLA) caches, which have no V section.
  bool has_v = true;
  uint32_t cell_ext_bytes = 0;
  // 1 or 2, as the model has it. 0 takes either, and cannot tell a file that was cut between its
  // two bodies from a whole one.
  uint32_t num_bodies = 0;
};

// A parsed state over bytes that the caller keeps. Immutable; thread-safe.
class LlamaCppState : public RowReader {
 public:
  // Reads whichever form `bytes` begin with. DATA_LOSS when they end early, have bytes left over or
  // contradict themselves; INVALID_ARGUMENT for a version or a data type that is not known.
  // Memory used is bounded by the number of cells and tokens that `bytes` really holds.
  static absl::StatusOr<LlamaCppState> Parse(absl::string_view bytes, const LlamaCppHints& hints);

  const LlamaCppLayout& layout() const { return layout_; }
  // One block a body, with one row a cell. No layers in a body without cells.
  const SequenceState& state() const { return state_; }
  absl::Status ReadRows(const RowRange& range, std::span<std::byte> out) const override;

 private:
  class Parser;
  // Of one layer: views into the input.
  struct LayerBytes {
    absl::string_view k;
    absl::string_view v;
  };
  LlamaCppLayout layout_;
  SequenceState state_;
  std::vector<std::vector<LayerBytes>> rows_;  // [block][layer]
};

// Bytes that WriteLlamaCpp writes. INVALID_ARGUMENT or FAILED_PRECONDITION for what the format
// cannot express: no tokens in the file form, fp8, packed rows, transposed V of a block type,
// positions above 2^31 - 1.
absl::StatusOr<uint64_t> LlamaCppStateBytes(const LlamaCppLayout& layout,
                                            const SequenceState& state);

// Writes `state` with the rows of `rows`. With layout and state of a parsed file the bytes are that
// file's. Uses at most 32 MiB (a column of transposed V where that is more).
absl::Status WriteLlamaCpp(const LlamaCppLayout& layout, const SequenceState& state,
                           const RowReader& rows, ByteSink sink);

// ggml's number of a data type, and back; nullopt for what one of both does not have.
std::optional<int32_t> GgmlTypeOf(DataType type);
std::optional<DataType> DataTypeOfGgml(int32_t type);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_LLAMA_CPP_H_
