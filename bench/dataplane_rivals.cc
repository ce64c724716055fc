#include "bench/dataplane_rivals.h"

#include "absl/strings/str_cat.h"

namespace pagetide::bench {

Rivals::Rivals(const std::string& folder, bool is_unix, uint64_t num_bytes) {
  const auto address = [&](absl::string_view name) {
    return is_unix ? absl::StrCat("--serve=unix:", folder, "/", name, ".sock")
                   : "--serve=127.0.0.1:0";
  };
  const std::string memory = absl::StrCat("--memory-bytes=", num_bytes);
  SocketTuning tuning;
  tuning.buffer_bytes = is_unix ? 1 << 20 : 0;  // the best of socket_baseline
  socket_.server = std::make_unique<BenchProcess>(
      SiblingPath("socket_baseline"),
      std::vector<std::string>{address("socket"),
                               absl::StrCat("--buffer-bytes=", tuning.buffer_bytes), memory});
  socket_.client = std::make_unique<SocketClient>(socket_.server->Value("address"), tuning);
  for (const bool works : {false, true}) {
    for (const bool use_callbacks : {false, true}) {
      Bare bare;
      bare.name = absl::StrCat("bare gRPC, ", use_callbacks ? "callbacks" : "synchronous",
                               works ? ", copy, checksum" : "");
      bare.works = works;
      std::vector<std::string> args = {address(absl::StrCat("bare", bare_.size())), memory};
      if (use_callbacks) args.push_back("--callbacks");
      if (works) args.insert(args.end(), {"--copy", "--checksum"});
      bare.server = std::make_unique<BenchProcess>(SiblingPath("bare_stream"), args);
      bare.client = std::make_unique<BareStreamClient>(bare.server->Value("address"));
      bare_.push_back(std::move(bare));
    }
  }
}

std::vector<Contender> Rivals::Contenders(bool is_append,
                                          std::function<void(SocketClient&)> by_socket,
                                          std::function<void(BareStreamClient&)> by_grpc) const {
  std::vector<Contender> all = {{"plain socket", [this, by_socket] {
                                   return TimeWith(*socket_.server,
                                                   [&] { by_socket(*socket_.client); });
                                 }}};
  for (const Bare& bare : bare_) {
    if (bare.works && !is_append) continue;
    all.push_back({bare.name, [&bare, by_grpc] {
                     return TimeWith(*bare.server, [&] { by_grpc(*bare.client); });
                   }});
  }
  return all;
}

}  // namespace pagetide::bench
