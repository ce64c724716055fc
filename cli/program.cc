#include "cli/program.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr absl::Duration kPollInterval = absl::Milliseconds(5);
constexpr size_t kLogTailBytes = 2000;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// In the child, between fork and exec: only async-signal-safe calls.
[[noreturn]] void Exec(const char* path, char* const* argv, int log_fd, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // the parent died before the line above
  dup2(log_fd, STDOUT_FILENO);
  dup2(log_fd, STDERR_FILENO);
  execv(path, argv);
  _exit(127);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Program>> Program::Start(std::string path,
                                                        std::vector<std::string> args,
                                                        std::string log_path,
                                                        absl::Duration timeout) {
  if (access(path.c_str(), X_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("start ", path, ": ", strerror(errno)));
  }
  const int log_fd =
      open(log_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  if (log_fd < 0) {
    return absl::InternalError(absl::StrCat("create ", log_path, ": ", strerror(errno)));
  }
  std::vector<char*> argv{path.data()};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) Exec(path.c_str(), argv.data(), log_fd, parent);
  const int fork_errno = errno;
  close(log_fd);
  if (pid < 0) return absl::InternalError(absl::StrCat("fork: ", strerror(fork_errno)));
  const std::string name = path.substr(path.rfind('/') + 1);
  std::unique_ptr<Program> program(new Program(name, std::move(log_path), pid));
  PT_RETURN_IF_ERROR(program->WaitReady(timeout));
  return program;
}

Program::~Program() {
  Kill();
}

absl::Status Program::WaitReady(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    const bool ended = Reap(/*block=*/false);
    const std::string log = ReadAll(log_path_);
    for (absl::string_view line : absl::StrSplit(log, '\n')) {
      if (absl::StartsWith(line, absl::StrCat(name_, " ready"))) {
        ready_line_ = std::string(line);
        // The last line may still be on its way; programs end it with the line's own newline.
        if (absl::StrContains(log, absl::StrCat(ready_line_, "\n"))) return absl::OkStatus();
      }
    }
    if (ended) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, " ended before it was ready:\n", LogTail()));
    }
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          name_, " was not ready after ", absl::FormatDuration(timeout), ":\n", LogTail()));
    }
    absl::SleepFor(kPollInterval);
  }
}

std::string Program::LogTail() const {
  const std::string log = ReadAll(log_path_);
  return log.size() <= kLogTailBytes ? log : log.substr(log.size() - kLogTailBytes);
}

std::string Program::Address(absl::string_view key) const {
  const std::string prefix = absl::StrCat(key, "=");
  for (absl::string_view word : absl::StrSplit(ready_line_, ' ')) {
    if (absl::StartsWith(word, prefix)) return std::string(word.substr(prefix.size()));
  }
  return "";
}

bool Program::Reap(bool block) {
  if (!is_running_) return true;
  pid_t reaped;
  do {
    reaped = waitpid(pid_, &wait_status_, block ? 0 : WNOHANG);
  } while (reaped < 0 && errno == EINTR);
  if (reaped == 0) return false;
  is_running_ = false;
  return true;
}

void Program::Kill() {
  if (!is_running_) return;
  kill(pid_, SIGKILL);
  Reap(/*block=*/true);
}

absl::Status Program::Terminate(absl::Duration timeout) {
  if (!is_running_) return absl::OkStatus();
  kill(pid_, SIGTERM);
  const absl::Time deadline = absl::Now() + timeout;
  while (!Reap(/*block=*/false)) {
    if (absl::Now() > deadline) {
      return absl::InternalError(absl::StrCat(name_, " still runs ", absl::FormatDuration(timeout),
                                              " after SIGTERM:\n", LogTail()));
    }
    absl::SleepFor(kPollInterval);
  }
  if (WIFEXITED(wait_status_) && WEXITSTATUS(wait_status_) == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(name_, " ended with ",
                   WIFEXITED(wait_status_) ? absl::StrCat("exit code ", WEXITSTATUS(wait_status_))
                                           : absl::StrCat("signal ", WTERMSIG(wait_status_)),
                   " after SIGTERM:\n", LogTail()));
}

}  // namespace pagetide
