// Program: a program of PageTide that a subcommand starts, talks to, kills and stops.
//
// Its output goes to a file; programs say "NAME ready key=address …" on stdout when they serve. The
// child is killed when the handle goes, and by the kernel when the thread that started it ends. For
// one thread.
#ifndef PAGETIDE_CLI_PROGRAM_H_
#define PAGETIDE_CLI_PROGRAM_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pagetide {

class Program {
 public:
  // Starts `path` and waits for its ready line. NOT_FOUND when there is no such program,
  // FAILED_PRECONDITION when it ends first, DEADLINE_EXCEEDED; with the end of what it wrote.
  static absl::StatusOr<std::unique_ptr<Program>> Start(std::string path,
                                                        std::vector<std::string> args,
                                                        std::string log_path,
                                                        absl::Duration timeout = absl::Seconds(20));
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Value of `key` in the ready line; empty if absent.
  std::string Address(absl::string_view key) const;
  pid_t pid() const { return pid_; }
  bool IsRunning() const { return is_running_; }

  // SIGKILL, then reaped.
  void Kill();
  // SIGTERM, then reaped. INTERNAL unless it ends with exit code 0 in time.
  absl::Status Terminate(absl::Duration timeout = absl::Seconds(30));

 private:
  Program(std::string name, std::string log_path, pid_t pid)
      : name_(std::move(name)), log_path_(std::move(log_path)), pid_(pid) {}
  absl::Status WaitReady(absl::Duration timeout);
  // True when the child has ended; its wait status goes to wait_status_.
  bool Reap(bool block);
  std::string LogTail() const;

  const std::string name_;
  const std::string log_path_;
  const pid_t pid_;
  std::string ready_line_;
  bool is_running_ = true;
  int wait_status_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CLI_PROGRAM_H_
