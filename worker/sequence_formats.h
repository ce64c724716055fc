// Sequences as files: export and import in PageTide's own format and in those of other programs
// (formats/, docs/formats/). Knows no gRPC. Stateless functions and one object a call; the host
// outlives them.
#ifndef PAGETIDE_WORKER_SEQUENCE_FORMATS_H_
#define PAGETIDE_WORKER_SEQUENCE_FORMATS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "formats/geometry_map.h"
#include "formats/llama_cpp.h"
#include "formats/sequence_state.h"
#include "worker/model_host.h"

namespace pagetide {

// Values equal the proto enum StateFormat.
enum class StateFormat : uint8_t { kNative = 1, kLlamaCpp = 2, kMlx = 3, kLlamaSharp = 4 };

// What the rows do not decide of a file: an import tells what it found, an export takes it, so that
// a file that went in can come out again bit for bit.
struct FileLayout {
  // llama.cpp, and the state in a LLamaSharp file.
  LlamaCppForm llama_form = LlamaCppForm::kFile;
  uint32_t llama_version = 2;
  int32_t llama_sequence_id = 0;
  bool llama_v_transposed = false;
  uint32_t llama_num_streams = 1;
  uint32_t llama_stream = 0;
  // [body]: positions of its cells, in their order. Empty: those of the state, ascending.
  std::vector<std::vector<uint32_t>> llama_cells;
  // MLX: MlxCache::layout() of an import; empty: made from the model, with the two fields below.
  std::string mlx_layout;
  bool mlx_legacy = false;
  std::map<std::string, std::string> mlx_metadata;
  // LLamaSharp: the JSON as it stands; empty: made.
  std::string llama_sharp_json;
};

// The format that a file begins with. INVALID_ARGUMENT for none that is known.
absl::StatusOr<StateFormat> RecogniseFormat(absl::string_view bytes);

// Pages of tokens that an import or an export has in frames at a time: at most half of a small pool,
// so that others' calls go on beside it.
uint64_t PagesAtOnce(ModelHost* host);

// One export: the sequence as it was at Begin, whatever happens to it meanwhile (it is forked).
class SequenceExport {
 public:
  // FAILED_PRECONDITION (CANNOT_EXPRESS): what the format cannot hold of this model or sequence.
  static absl::StatusOr<std::unique_ptr<SequenceExport>> Begin(ModelHost* host,
                                                               const Tenant& tenant, SequenceId id,
                                                               StateFormat format,
                                                               const FileLayout& layout,
                                                               MonotonicTime deadline);
  virtual ~SequenceExport() = default;
  virtual uint64_t total_bytes() const = 0;
  virtual uint64_t num_tokens() const = 0;
  // Once. Makes pages resident as it goes, a few at a time.
  virtual absl::Status Write(ByteSink sink) = 0;
};

struct ImportOptions {
  // Absent: recognised.
  std::optional<StateFormat> format;
  // Of formats that carry none (all but the native one and llama.cpp's file form).
  std::vector<uint32_t> tokens;
  // Basis of the rows, which no foreign format records. Must be given for quantised llama.cpp rows,
  // which that program stores rotated unless told otherwise.
  std::optional<LayerGroupSpec::Basis> basis;
};

struct ImportResult {
  SequenceInfo info;
  StateFormat format = StateFormat::kNative;
  // The rows were proven canonical: their pages are keyed and shared.
  bool is_canonical = false;
  FileLayout layout;
};

// A new sequence with the tokens and rows of `file`, or nothing. All of the file is checked before
// a frame is taken. DATA_LOSS: cut or hostile; INVALID_ARGUMENT: not known; FAILED_PRECONDITION
// (MODEL_MISMATCH, BASIS_UNKNOWN): another geometry.
absl::StatusOr<ImportResult> ImportSequenceFile(ModelHost* host, const Tenant& tenant,
                                                absl::string_view file,
                                                const ImportOptions& options,
                                                MonotonicTime deadline);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_FORMATS_H_
