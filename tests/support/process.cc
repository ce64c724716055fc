#include "tests/support/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"

extern char** environ;

namespace pagetide::testing {
namespace {

constexpr size_t kMaxLogBytes = size_t{1} << 20;
constexpr absl::Duration kPollStep = absl::Milliseconds(10);

std::string Errno(absl::string_view action) {
  return absl::StrCat(action, ": ", strerror(errno));
}

}  // namespace

std::string ProgramPath(absl::string_view name) {
  if (name.find('/') != absl::string_view::npos) return std::string(name);
  return absl::StrCat(PAGETIDE_BINARY_DIR, "/bin/", name);
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(Options options) {
  std::unique_ptr<ChildProcess> child(new ChildProcess(std::move(options)));
  absl::Status status = child->Spawn();
  if (status.ok() && child->options_.wait_ready) status = child->WaitReady();
  if (!status.ok()) return status;
  return child;
}

ChildProcess::ChildProcess(Options options) : options_(std::move(options)) {}

ChildProcess::~ChildProcess() {
  Kill();
  if (reader_.joinable()) {
    eventfd_write(stop_fd_, 1);
    reader_.join();
  }
  if (output_fd_ >= 0) close(output_fd_);
  if (stop_fd_ >= 0) close(stop_fd_);
  if (::testing::Test::HasFailure()) {
    fprintf(stderr, "---- output of %s (pid %d) ----\n%s---- end ----\n", options_.program.c_str(),
            static_cast<int>(pid_), Log().c_str());
  }
}

absl::Status ChildProcess::Spawn() {
  const std::string path = ProgramPath(options_.program);
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>(path.c_str()));
  for (const std::string& arg : options_.args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  std::vector<std::string> variables;
  for (char** v = environ; *v != nullptr; ++v) variables.emplace_back(*v);
  for (const auto& [name, value] : options_.environment) {
    variables.push_back(absl::StrCat(name, "=", value));
  }
  std::vector<char*> envp;
  for (std::string& v : variables) envp.push_back(v.data());
  envp.push_back(nullptr);

  int fds[2];
  stop_fd_ = eventfd(0, EFD_CLOEXEC);
  if (stop_fd_ < 0) return absl::InternalError(Errno("eventfd"));
  if (pipe2(fds, O_CLOEXEC) != 0) return absl::InternalError(Errno("pipe"));
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) {
    const absl::Status status = absl::InternalError(Errno("fork"));
    close(fds[0]);
    close(fds[1]);
    return status;
  }
  if (pid == 0) {  // only async-signal-safe calls from here on
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(126);
    dup2(fds[1], STDOUT_FILENO);
    dup2(fds[1], STDERR_FILENO);
    execve(path.c_str(), argv.data(), envp.data());
    _exit(127);
  }
  close(fds[1]);
  // Ours alone: the child writes to the other end.
  fcntl(fds[0], F_SETFL, O_NONBLOCK);
  pid_ = pid;
  output_fd_ = fds[0];
  reader_ = std::thread([this] { ReadOutput(); });
  return absl::OkStatus();
}

void ChildProcess::ReadOutput() {
  for (;;) {
    pollfd ready[] = {{output_fd_, POLLIN, 0}, {stop_fd_, POLLIN, 0}};
    if (poll(ready, 2, -1) < 0) {
      if (errno == EINTR) continue;
      return;
    }
    MutexLock lock(&mu_);
    DrainOutput();
    if (output_ended_ || ready[1].revents != 0) return;
  }
}

void ChildProcess::DrainOutput() {
  char buffer[4096];
  while (!output_ended_) {
    const ssize_t n = read(output_fd_, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n <= 0) {
      output_ended_ = true;
      break;
    }
    log_.append(buffer, n);
    if (log_.size() > kMaxLogBytes) log_.erase(0, log_.size() - kMaxLogBytes);
    for (ssize_t i = 0; i < n; ++i) {
      if (buffer[i] != '\n') {
        line_.push_back(buffer[i]);
        continue;
      }
      if (found_ready_line_.empty() && line_.find(" ready ") != std::string::npos) {
        found_ready_line_ = line_;
      }
      line_.clear();
    }
  }
  changed_.SignalAll();
}

absl::Status ChildProcess::WaitReady() {
  const MonotonicTime deadline = Clock::Real()->MonotonicNow() + options_.ready_timeout;
  {
    MutexLock lock(&mu_);
    while (found_ready_line_.empty() && !output_ended_) {
      const absl::Duration left = deadline - Clock::Real()->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(
            absl::StrCat("start ", options_.program, ": no ready line within ",
                         absl::FormatDuration(options_.ready_timeout), "; it wrote:\n", log_));
      }
      changed_.WaitWithTimeout(&mu_, left);
    }
    ready_line_ = found_ready_line_;
  }
  if (ready_line_.empty()) {
    const absl::StatusOr<int> code = Wait(absl::Seconds(5));
    return absl::FailedPreconditionError(absl::StrCat(
        "start ", options_.program, ": ended with code ",
        code.ok() ? absl::StrCat(*code) : "unknown", " before it was ready; it wrote:\n", Log()));
  }
  for (absl::string_view word : absl::StrSplit(ready_line_, ' ', absl::SkipEmpty())) {
    const size_t eq = word.find('=');
    if (eq == absl::string_view::npos) continue;
    addresses_.emplace(std::string(word.substr(0, eq)), std::string(word.substr(eq + 1)));
  }
  return absl::OkStatus();
}

std::string ChildProcess::Address(absl::string_view key) const {
  const auto it = addresses_.find(std::string(key));
  return it == addresses_.end() ? std::string() : it->second;
}

bool ChildProcess::Reap(bool block) {
  {
    MutexLock lock(&mu_);
    if (pid_ < 0 || exit_code_.has_value()) return true;
  }
  int status = 0;
  const pid_t got = waitpid(pid_, &status, block ? 0 : WNOHANG);
  if (got != pid_) return false;
  MutexLock lock(&mu_);
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return true;
}

void ChildProcess::Kill() {
  if (Reap(/*block=*/false)) return;
  kill(pid_, SIGKILL);
  Reap(/*block=*/true);
}

absl::StatusOr<int> ChildProcess::Terminate(absl::Duration timeout) {
  if (!Reap(/*block=*/false)) kill(pid_, SIGTERM);
  return Wait(timeout);
}

absl::StatusOr<int> ChildProcess::Wait(absl::Duration timeout) {
  const MonotonicTime deadline = Clock::Real()->MonotonicNow() + timeout;
  while (!Reap(/*block=*/false)) {
    if (Clock::Real()->MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("wait for ", options_.program, " (pid ", pid_,
                                                      "): still running after ",
                                                      absl::FormatDuration(timeout)));
    }
    absl::SleepFor(kPollStep);
  }
  MutexLock lock(&mu_);
  // What it wrote may still lie in the pipe. Its end may never come: a child of its own can hold
  // it.
  DrainOutput();
  return *exit_code_;
}

void ChildProcess::Stop() {
  if (IsRunning()) kill(pid_, SIGSTOP);
}

void ChildProcess::Continue() {
  if (IsRunning()) kill(pid_, SIGCONT);
}

bool ChildProcess::IsRunning() const {
  return !const_cast<ChildProcess*>(this)->Reap(false);
}

std::string ChildProcess::Log() const {
  MutexLock lock(&mu_);
  return log_;
}

TempDir::TempDir() {
  const char* base = getenv("TMPDIR");
  std::string pattern = absl::StrCat(base != nullptr ? base : "/tmp", "/pagetide-test-XXXXXX");
  if (mkdtemp(pattern.data()) == nullptr) {
    ADD_FAILURE() << Errno(absl::StrCat("create ", pattern));
    return;
  }
  path_ = pattern;
}

TempDir::~TempDir() {
  if (path_.empty()) return;
  std::error_code ignored;  // a leftover in the temp folder harms nobody
  std::filesystem::remove_all(path_, ignored);
}

std::string TempDir::operator/(absl::string_view name) const {
  return absl::StrCat(path_, "/", name);
}

}  // namespace pagetide::testing
