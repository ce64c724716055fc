// Files on their way into a worker: whatever the bytes, a refused one leaves no sequence and no
// frame; an accepted one comes out again in its own format, and that file goes in and out as
// itself. Input: four bytes (model, what the caller says of the file, number of tokens), then the
// file.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/executor.h"
#include "formats/native.h"
#include "tests/fuzz/fuzz_check.h"
#include "worker/cpu_device.h"
#include "worker/sequence_formats.h"

namespace pagetide {
namespace {

LayerGroupSpec Group(std::vector<uint32_t> layers, uint32_t kv_heads, uint32_t dim,
                     DataType type = DataType::kF16) {
  LayerGroupSpec group;
  group.layers = std::move(layers);
  group.kv_heads = kv_heads;
  group.k_dim = group.v_dim = dim;
  group.k_type = group.v_type = type;
  return group;
}
LayerGroupSpec Window(LayerGroupSpec group, LayerGroupSpec::WindowType type, uint32_t tokens) {
  group.kind = LayerGroupSpec::Kind::kWindow;
  group.window_type = type;
  group.window_tokens = tokens;
  return group;
}

// Those that the files of tests/formats/testdata fit.
std::vector<std::vector<LayerGroupSpec>> Models() {
  using Type = LayerGroupSpec::WindowType;
  LayerGroupSpec packed = Group({0}, 0, 0);
  packed.packed_row_bytes = 2 * 2 * (32 + 4 + 4);
  return {{Group({0, 1}, 1, 32)},
          {Group({0, 1}, 1, 32, DataType::kQ8_0)},
          {Group({5}, 1, 32), Window(Group({0, 1, 2, 3, 4}, 1, 32), Type::kStandard, 8)},
          {Group({0, 1}, 2, 8)},
          {packed},
          {Window(Group({0}, 2, 8), Type::kChunked, 8)},
          {Window(Group({0, 1}, 2, 8), Type::kStandard, 8)},
          {Group({0, 1}, 1, 8)}};
}

// More than two imports of the longest input need: nothing waits for a frame.
constexpr uint32_t kFrames = 16384;

class Hosts {
 public:
  Hosts() : io_({.name = "io", .num_threads = 1, .max_queue = 64}) {
    for (std::vector<LayerGroupSpec>& groups : Models()) {
      ModelSpec spec;
      spec.name = "fuzz";
      spec.geometry.page_tokens = 4;
      spec.geometry.groups = std::move(groups);
      auto model = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
      ModelHost::Options options;
      options.pool_bytes = kFrames * model->geometry().bytes_per_page_of_tokens();
      options.incarnation = 1;
      hosts_.push_back(
          ModelHost::Create(options, model, &device_, nullptr, &io_, Clock::Real()).value());
    }
  }
  ModelHost& at(uint32_t i) { return *hosts_[i % hosts_.size()]; }
  uint32_t size() const { return static_cast<uint32_t>(hosts_.size()); }

 private:
  CpuDevice device_;
  ThreadPoolExecutor io_;
  std::vector<std::unique_ptr<ModelHost>> hosts_;
};

MonotonicTime Soon() {
  return Clock::Real()->MonotonicNow() + absl::Seconds(8);
}

absl::StatusOr<std::string> Export(ModelHost& host, const Tenant& tenant, SequenceId id,
                                   StateFormat format, const FileLayout& layout) {
  const auto begun = SequenceExport::Begin(&host, tenant, id, format, layout, Soon());
  if (!begun.ok()) return begun.status();
  std::string file;
  const absl::Status written = (*begun)->Write([&](absl::string_view part) {
    FUZZ_CHECK(part.size() <= kMaxSinkBytes);
    file.append(part.data(), part.size());
    return absl::OkStatus();
  });
  FUZZ_CHECK(written.ok());
  FUZZ_CHECK(file.size() == (*begun)->total_bytes());
  return file;
}

void CheckNothingHeld(ModelHost& host, const Tenant& tenant) {
  FUZZ_CHECK(host.List(tenant, 0, 10).empty());
  host.ClearCache(false);
  for (const PoolUsage& pool : host.Usage()) FUZZ_CHECK(pool.free_frames == pool.num_frames);
}

// What the file's writer would have put at its end.
void Repair(const TenantSalt& salt, std::string* file) {
  if (file->size() < 64 || file->compare(0, 4, "PTSQ") != 0) return;
  file->resize(file->size() - 64);
  const Digest content = Sha256Of(*file);
  *file += content.ToBytes();
  *file += HmacSha256(salt.digest.view(), absl::StrCat("pagetide.sequence_file.v1", content.view()))
               .ToBytes();
}

}  // namespace
}  // namespace pagetide

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  static Hosts hosts;
  const Tenant tenant{"fuzz", DeriveTenantSalt("secret", "fuzz")};
  FuzzInput in(data, size);
  ModelHost& host = hosts.at(in.Take<uint8_t>());
  const uint8_t flags = in.Take<uint8_t>();
  ImportOptions options;
  if ((flags & 1) != 0) options.basis = LayerGroupSpec::Basis::kPlain;
  if ((flags & 2) != 0) options.basis = LayerGroupSpec::Basis::kHadamard;
  if (flags >> 4 >= 1 && flags >> 4 <= 4) options.format = static_cast<StateFormat>(flags >> 4);
  const uint32_t num_tokens = in.Take<uint8_t>();
  (void)in.Take<uint8_t>();
  for (uint32_t i = 0; i < num_tokens; ++i) options.tokens.push_back((7 * i + 3) % 64);
  std::string file(in.rest());
  if ((flags & 4) != 0) Repair(tenant.salt, &file);

  const auto imported = ImportSequenceFile(&host, tenant, file, options, Soon());
  if (!imported.ok()) {
    const absl::StatusCode code = imported.status().code();
    FUZZ_CHECK(code == absl::StatusCode::kDataLoss || code == absl::StatusCode::kInvalidArgument ||
               code == absl::StatusCode::kFailedPrecondition);
    CheckNothingHeld(host, tenant);
    return 0;
  }
  FUZZ_CHECK(imported->info.length > 0 && imported->info.length <= uint64_t{kFrames} * 4);
  FUZZ_CHECK(imported->is_canonical ? imported->info.canonical_length == imported->info.length
                                    : imported->info.canonical_length == 0);
  options.format = imported->format;
  const auto out = Export(host, tenant, imported->info.id, imported->format, imported->layout);
  if (out.ok()) {
    const auto second = ImportSequenceFile(&host, tenant, *out, options, Soon());
    FUZZ_CHECK(second.ok());
    const auto again = Export(host, tenant, second->info.id, second->format, second->layout);
    FUZZ_CHECK(again.ok() && *again == *out);
    FUZZ_CHECK(host.Close(tenant, second->info.id, second->info.epoch).ok());
  } else {
    FUZZ_CHECK(absl::IsFailedPrecondition(out.status()));
  }
  for (const StateFormat format : {StateFormat::kNative, StateFormat::kLlamaCpp, StateFormat::kMlx,
                                   StateFormat::kLlamaSharp}) {
    (void)Export(host, tenant, imported->info.id, format, {});
  }
  FUZZ_CHECK(host.Close(tenant, imported->info.id, imported->info.epoch).ok());
  CheckNothingHeld(host, tenant);
  return 0;
}
