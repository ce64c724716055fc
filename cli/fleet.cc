#include "cli/fleet.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "clients/cpp/serving_workers.h"

namespace pagetide {
namespace {

absl::StatusOr<std::string> OwnFolder() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::InternalError(absl::StrCat("find own program: ", error.message()));
  return self.parent_path().string();
}

absl::StatusOr<std::string> MakeTempFolder() {
  const char* base = std::getenv("TMPDIR");
  std::string path =
      absl::StrCat(base == nullptr || *base == '\0' ? "/tmp" : base, "/pagetide-demo-XXXXXX");
  if (mkdtemp(path.data()) == nullptr) {
    return absl::InternalError(absl::StrCat("make folder ", path, ": ", strerror(errno)));
  }
  return path;
}

// A worker takes calls before the router knows of it.
absl::Status AwaitWorkers(const std::string& router_address, int num_workers) {
  constexpr absl::Duration kPatience = absl::Seconds(60);
  ClientOptions options;
  options.router_address = router_address;
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Client> client, Client::Create(std::move(options)));
  const absl::Time give_up = absl::Now() + kPatience;
  for (;;) {
    PT_ASSIGN_OR_RETURN(const std::vector<v1::WorkerInfo> workers, client->ListWorkers());
    const int serving = static_cast<int>(ServingWorkers(workers).size());
    if (serving >= num_workers) return absl::OkStatus();
    if (absl::Now() >= give_up) {
      return absl::DeadlineExceededError(
          absl::StrCat("start fleet: router ", router_address, " knows ", serving, " of ",
                       num_workers, " workers after ", absl::FormatDuration(kPatience)));
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
}

}  // namespace

std::string Fleet::WorkerId(size_t index) {
  return absl::StrCat("demo-worker-", index + 1);
}

absl::StatusOr<std::unique_ptr<Fleet>> Fleet::Start(const FleetOptions& options) {
  std::string programs = options.program_dir;
  if (programs.empty()) {
    PT_ASSIGN_OR_RETURN(programs, OwnFolder());
  }
  PT_ASSIGN_OR_RETURN(std::string dir, MakeTempFolder());
  std::unique_ptr<Fleet> fleet(new Fleet(dir));
  PT_ASSIGN_OR_RETURN(fleet->store_,
                      Program::Start(absl::StrCat(programs, "/pagetide-store"),
                                     {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                                      absl::StrCat("--data-dir=", dir, "/store")},
                                     absl::StrCat(dir, "/store.log")));
  PT_ASSIGN_OR_RETURN(fleet->router_,
                      Program::Start(absl::StrCat(programs, "/pagetide-router"),
                                     {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                                      absl::StrCat("--store=", fleet->store_address())},
                                     absl::StrCat(dir, "/router.log")));
  for (int i = 0; i < options.num_workers; ++i) {
    const std::string id = WorkerId(i);
    std::vector<std::string> args = {absl::StrCat("--worker-id=", id),
                                     "--listen=127.0.0.1:0",
                                     absl::StrCat("--local-socket=", dir, "/", id, ".sock"),
                                     absl::StrCat("--store=", fleet->store_address()),
                                     absl::StrCat("--router=", fleet->router_address()),
                                     absl::StrCat("--pool-bytes=", options.pool_bytes)};
    if (options.unsafe_skip_verify) args.push_back("--unsafe-skip-verify");
    PT_ASSIGN_OR_RETURN(auto worker,
                        Program::Start(absl::StrCat(programs, "/pagetide-worker"), std::move(args),
                                       absl::StrCat(dir, "/", id, ".log")));
    fleet->workers_.push_back(std::move(worker));
  }
  PT_RETURN_IF_ERROR(AwaitWorkers(fleet->router_address(), options.num_workers));
  return fleet;
}

absl::Status Fleet::Stop() {
  absl::Status first;
  for (const auto& worker : workers_) first.Update(worker->Terminate());
  first.Update(router_->Terminate());
  first.Update(store_->Terminate());
  return first;
}

Fleet::~Fleet() {
  workers_.clear();
  router_.reset();
  store_.reset();
  std::error_code ignored;  // the system cleans its temporary folder
  std::filesystem::remove_all(dir_, ignored);
}

}  // namespace pagetide
