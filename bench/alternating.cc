#include "bench/alternating.h"

#include <algorithm>
#include <cstdio>

#include "bench/seconds_now.h"

namespace pagetide::bench {

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Measured TimeWith(const BenchProcess& other, const std::function<void()>& work) {
  const double cpu = OwnCpuSeconds() + other.CpuSeconds();
  const double began = SecondsNow();
  work();
  const double seconds = SecondsNow() - began;
  return {seconds, OwnCpuSeconds() + other.CpuSeconds() - cpu};
}

void RunAlternating(const std::vector<Case>& cases, int runs) {
  std::vector<std::vector<std::vector<Measured>>> results(cases.size());  // [case][run][contender]
  for (int run = 0; run <= runs; ++run) {
    for (size_t i = 0; i < cases.size(); ++i) {
      std::vector<Measured> measured;
      for (const Contender& contender : cases[i].contenders) measured.push_back(contender.run());
      if (run > 0) results[i].push_back(std::move(measured));  // the first warms up
    }
  }
  std::printf(
      "| case | contender | GB/s | of the first | the last's share of it | CPU-s/GB | cores busy "
      "|\n|---|---|---|---|---|---|---|\n");
  for (size_t i = 0; i < cases.size(); ++i) {
    const double gb = static_cast<double>(cases[i].num_bytes) / 1e9;
    for (size_t c = 0; c < cases[i].contenders.size(); ++c) {
      std::vector<double> speed, of_first, share, cpu, cores;
      for (const std::vector<Measured>& run : results[i]) {
        speed.push_back(gb / run[c].seconds);
        of_first.push_back(run.front().seconds / run[c].seconds);
        share.push_back(run[c].seconds / run.back().seconds);
        cpu.push_back(run[c].cpu_seconds / gb);
        cores.push_back(run[c].cpu_seconds / run[c].seconds);
      }
      std::printf("| %s | %s | %.2f | %.2f | %.2f | %.2f | %.1f |\n", cases[i].name.c_str(),
                  cases[i].contenders[c].name.c_str(), Median(speed), Median(of_first),
                  Median(share), Median(cpu), Median(cores));
    }
  }
}

}  // namespace pagetide::bench
