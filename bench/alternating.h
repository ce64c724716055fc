// Contenders for one job, run in turn again and again: what a drift of the machine does to one, it
// does to its neighbours, and the median of the ratios of neighbouring runs is not moved by it.
#ifndef PAGETIDE_BENCH_ALTERNATING_H_
#define PAGETIDE_BENCH_ALTERNATING_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/bench_process.h"

namespace pagetide::bench {

double Median(std::vector<double> values);

struct Measured {
  double seconds = 0;
  double cpu_seconds = 0;  // of all processes that took part
};

// Times `work`, with the CPU time that this process and `other` spent on it.
Measured TimeWith(const BenchProcess& other, const std::function<void()>& work);

struct Contender {
  std::string name;
  std::function<Measured()> run;
};

// The first contender is what the others are held against, the last what is judged.
struct Case {
  std::string name;
  uint64_t num_bytes = 0;  // that one run moves
  std::vector<Contender> contenders;
};

// Runs every contender `runs` times, and once before to warm up. Prints a table of medians: bytes a
// second, the ratio to the first contender, the ratio of the last contender to this one, CPU
// seconds a GB, and how many cores were busy.
void RunAlternating(const std::vector<Case>& cases, int runs);

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_ALTERNATING_H_
