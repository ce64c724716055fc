// ChildProcess: a real program under test: started, watched, and hurt with signals.
//
//   auto worker = ChildProcess::Start({.program = "pagetide-worker", .args = {…}});
//   ASSERT_TRUE(worker.ok()) << worker.status();
//   Connect((*worker)->Address("grpc"));
//   (*worker)->Kill();                              // kill -9
//   EXPECT_EQ((*worker)->Terminate(), 0);           // SIGTERM, exit code
//
// Programs say "NAME ready key=address …" on stdout when they serve; Start waits for that line. All
// of stdout and stderr is kept (the last megabyte) and printed by the destructor if the running
// test has failed; once Wait or Terminate has told the exit code, Log() has all that the program
// wrote. The child is killed when the handle goes, and by the kernel when the *thread*
// that started it ends: start children from the test's main thread. Methods are for one thread at a
// time, except Log() and IsRunning().
#ifndef PAGETIDE_TESTS_SUPPORT_PROCESS_H_
#define PAGETIDE_TESTS_SUPPORT_PROCESS_H_

#include <sys/types.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"

namespace pagetide::testing {

class ChildProcess {
 public:
  struct Options {
    // A program of this build ("pagetide-worker") or a path.
    std::string program;
    std::vector<std::string> args;
    std::vector<std::pair<std::string, std::string>> environment;  // added to ours
    // Wait for the ready line; false: return once the program runs.
    bool wait_ready = true;
    absl::Duration ready_timeout = absl::Seconds(90);
  };

  // DEADLINE_EXCEEDED without a ready line in time, FAILED_PRECONDITION when the program ended
  // before it; both carry what the program wrote.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(Options options);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // Value of `key` in the ready line ("grpc" → "127.0.0.1:40123"); empty if absent.
  std::string Address(absl::string_view key) const;
  const std::string& ready_line() const { return ready_line_; }
  pid_t pid() const { return pid_; }

  // SIGKILL, then reaped.
  void Kill();
  // SIGTERM, then the exit code (128 + signal when a signal ended it), or DEADLINE_EXCEEDED with
  // the program still running.
  absl::StatusOr<int> Terminate(absl::Duration timeout = absl::Seconds(90));
  absl::StatusOr<int> Wait(absl::Duration timeout);
  // SIGSTOP and SIGCONT.
  void Stop();
  void Continue();

  bool IsRunning() const;
  std::string Log() const;

 private:
  explicit ChildProcess(Options options);
  absl::Status Spawn();
  absl::Status WaitReady();
  void ReadOutput();
  // Appends what is in the pipe now to the log, without waiting for more.
  void DrainOutput() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Reaps if the child has ended.
  bool Reap(bool block);

  const Options options_;
  pid_t pid_ = -1;
  int output_fd_ = -1;
  int stop_fd_ = -1;  // eventfd: the reader ends, though a child of the program holds the output
  std::string ready_line_;
  std::map<std::string, std::string, std::less<>> addresses_;
  std::thread reader_;

  mutable Mutex mu_;
  CondVar changed_;
  std::string log_ ABSL_GUARDED_BY(mu_);
  std::string line_ ABSL_GUARDED_BY(mu_);  // of the output, begun and not ended
  std::string found_ready_line_ ABSL_GUARDED_BY(mu_);
  bool output_ended_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<int> exit_code_ ABSL_GUARDED_BY(mu_);
};

// Path of a program of this build.
std::string ProgramPath(absl::string_view name);

// A fresh directory, removed with its contents at the end.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(absl::string_view name) const;

 private:
  std::string path_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SUPPORT_PROCESS_H_
