#include "bench/dataplane_worker.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"

namespace pagetide::bench {
namespace {

Model BenchModel() {
  ModelSpec spec;
  spec.name = "dataplane-bench";
  spec.geometry.page_tokens = kPageTokens;
  LayerGroupSpec group;
  for (uint32_t layer = 0; layer < kLayers; ++layer) group.layers.push_back(layer);
  group.k_type = group.v_type = DataType::kF16;
  group.kv_heads = 4;
  group.k_dim = group.v_dim = 128;
  spec.geometry.groups.push_back(group);
  return Check(Model::Create(spec), "make model");
}

}  // namespace

void Die(const std::string& what) {
  std::fprintf(stderr, "dataplane_bench: %s\n", what.c_str());
  std::exit(1);
}

void Check(const absl::Status& status, const char* what) {
  if (!status.ok()) Die(absl::StrCat(what, ": ", status.ToString()));
}

Rows::Rows(uint64_t num_tokens)
    : num_tokens_(num_tokens), bytes_(num_tokens * kLayers * 2 * kRowBytes) {
  uint64_t x = 88172645463325252;
  for (size_t i = 0; i + 8 <= bytes_.size(); i += 8) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    std::memcpy(bytes_.data() + i, &x, 8);
  }
}

WorkerSide::WorkerSide(const std::string& folder)
    : folder_(folder), model_(std::make_shared<const Model>(BenchModel())) {
  const std::string store_dir = absl::StrCat(folder, "/store");
  {
    // As a router registers it, while no process has the store open.
    auto store = Check(RocksdbPageStore::Open({.dir = store_dir}), "open store");
    Check(store
              ->CompareAndSetRecord("model", model_->digest().ToHex(), 0,
                                    SerializeModelSpec(model_->spec()),
                                    MonotonicTime::InfiniteFuture())
              .status(),
          "register model");
  }
  process_ = std::make_unique<BenchProcess>(
      SiblingPath("pagetide-worker"),
      std::vector<std::string>{
          "--listen=127.0.0.1:0", absl::StrCat("--listen=unix:", folder, "/grpc.sock"),
          absl::StrCat("--local-socket=", local_socket()), absl::StrCat("--store-dir=", store_dir),
          absl::StrCat("--pool-bytes=", kPoolBytes),
          // The disk is store_bench's matter.
          "--write-through=false", "--spill-high-watermark=1", "--reserve-memory"});
}

std::unique_ptr<Client> WorkerSide::Connect(bool unix_socket, bool local_plane) const {
  ClientOptions options;
  options.worker_address =
      unix_socket ? absl::StrCat("unix:", folder_, "/grpc.sock") : process_->Value("grpc");
  options.worker_local_socket = local_socket();
  options.use_local_plane = local_plane;
  options.staging_bytes = 16 << 20;
  return Check(Client::Create(options), "make client");
}

std::string WorkerSide::local_socket() const {
  return absl::StrCat(folder_, "/local.sock");
}

std::unique_ptr<Sequence> OpenEmpty(Client& client, const WorkerSide& worker) {
  // One token of a prompt is never reused: the sequence starts empty.
  const std::vector<uint32_t> prompt = {1};
  return Check(client.Open(worker.model(), prompt, {.no_reuse = true}), "open");
}

void Append(Sequence& sequence, const Rows& rows, uint64_t begin, uint64_t end, uint32_t salt) {
  static const auto owner = std::make_shared<int>(0);  // `rows` outlives all calls
  std::vector<uint32_t> tokens(end - begin);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = salt * 1'000'003 + static_cast<uint32_t>(begin + i);
  }
  const auto append = Check(sequence.BeginAppend(tokens, /*will_attend=*/false), "begin append");
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      Check(append->WriteLentRows(0, layer, kind, 0, rows.Of(layer, kind, begin, end), owner),
            "write rows");
    }
  }
  Check(append->Commit().status(), "commit append");
}

uint64_t Read(Sequence& sequence, uint64_t begin, uint64_t end) {
  uint64_t bytes = 0;
  Check(sequence.ReadRowPieces(0, begin, end, {},
                               [&](const RowsPieces& part) {
                                 bytes += part.bytes->size();
                                 return absl::OkStatus();
                               }),
        "read rows");
  return bytes;
}

uint64_t Verify(Sequence& sequence, const Rows& rows) {
  uint64_t verified = 0;
  Check(sequence.ReadRows(0, 0, 0, {},
                          [&](const RowsPart& part) -> absl::Status {
                            const auto expected = rows.Of(part.layer, part.kind, part.first_token,
                                                          part.first_token + part.num_tokens);
                            if (std::memcmp(expected.data(), part.bytes.data(), expected.size()) !=
                                0) {
                              return absl::DataLossError("a row differs from what was appended");
                            }
                            verified += expected.size();
                            return absl::OkStatus();
                          }),
        "verify rows");
  if (verified != rows.all().size()) Die(absl::StrCat("verified only ", verified, " bytes"));
  return verified;
}

void ClearCache(Sequence& sequence) {
  grpc::ClientContext context;
  v1::ClearCacheResponse response;
  Check(FromGrpcStatus(sequence.worker().admin()->ClearCache(&context, {}, &response)),
        "clear cache");
}

}  // namespace pagetide::bench
