#include "bench/bench_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <sstream>

namespace pagetide::bench {
namespace {

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "benchmark: %s\n", what.c_str());
  std::exit(1);
}

double SecondsOf(clockid_t clock) {
  timespec time{};
  if (clock_gettime(clock, &time) != 0) return 0;
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

}  // namespace

BenchProcess::BenchProcess(const std::string& path, const std::vector<std::string>& args) {
  std::vector<char*> argv = {const_cast<char*>(path.c_str())};
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) Die("pipe");
  pid_ = fork();
  if (pid_ < 0) Die("fork");
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(fds[1], STDOUT_FILENO);
    execv(path.c_str(), argv.data());
    _exit(127);
  }
  close(fds[1]);
  output_ = fds[0];
  std::string line;
  for (char c; read(output_, &c, 1) == 1;) {
    if (c != '\n') {
      line.push_back(c);
      continue;
    }
    if (line.find(" ready ") != std::string::npos) break;
    line.clear();
  }
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t eq = word.find('=');
    if (eq != std::string::npos) values_[word.substr(0, eq)] = word.substr(eq + 1);
  }
  if (values_.empty()) Die("start " + path + ": it said nothing ready");
}

BenchProcess::~BenchProcess() {
  kill(pid_, SIGTERM);
  for (int i = 0; i < 100; ++i) {
    if (waitpid(pid_, nullptr, WNOHANG) == pid_) {
      close(output_);
      return;
    }
    usleep(100'000);
  }
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  close(output_);
}

const std::string& BenchProcess::Value(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) Die("the ready line has no " + key);
  return it->second;
}

double BenchProcess::CpuSeconds() const {
  clockid_t clock;
  if (clock_getcpuclockid(pid_, &clock) != 0) Die("read the CPU clock of a child");
  return SecondsOf(clock);
}

double OwnCpuSeconds() {
  return SecondsOf(CLOCK_PROCESS_CPUTIME_ID);
}

std::string OwnPath() {
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  if (size <= 0) Die("find the running program");
  return std::string(path, static_cast<size_t>(size));
}

std::string SiblingPath(const std::string& name) {
  const std::string own = OwnPath();
  return own.substr(0, own.rfind('/') + 1) + name;
}

}  // namespace pagetide::bench
