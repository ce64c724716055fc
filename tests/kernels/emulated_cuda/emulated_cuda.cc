#include "tests/kernels/emulated_cuda/cuda_runtime.h"

#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

// Lanes that wait for each other. Values of two rounds are kept: a lane can be one round ahead of
// one that has not read yet, never two.
struct Meeting {
  unsigned arrived = 0;
  int64_t round = 0;
  uint32_t value[2][32] = {};
  void* operands[32] = {};  // of a warp's common work, which the last lane to come does
};

struct AsyncCopy {
  void* to;
  const void* from;
  int num_bytes;
};

// A stack on which threads of the block run to their end, one after another; a thread that waits
// keeps it until it ends.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread;                      // the one that runs here
  std::function<bool()> can_go_on;  // while it waits
  bool is_done = false;
  void* fake_stack = nullptr;                    // AddressSanitizer's
  std::deque<std::vector<AsyncCopy>> copies{1};  // groups; the last one is open
};

// One block at a time.
struct Block {
  const std::function<void()>* thread = nullptr;
  std::vector<dim3> to_start;  // taken from the back
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::map<std::pair<unsigned, unsigned>, Meeting> warp_meetings;  // by warp and mask
  unsigned arrived = 0;                                            // at the block's barrier
  int64_t barrier_round = 0;
  std::vector<float4> shared;
};
Block* block_now = nullptr;
bool descending = false;

unsigned Rank() {
  return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

// Tells AddressSanitizer about the change of stacks around `swap`.
void SwitchStack(void** own_fake_stack, const void* to, size_t to_bytes, ucontext_t* from_context,
                 ucontext_t* to_context) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(own_fake_stack, to, to_bytes);
#endif
  swapcontext(from_context, to_context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(*own_fake_stack, nullptr, nullptr);
#endif
}

void ToScheduler(Fiber& fiber) {
  Block& block = *block_now;
  SwitchStack(&fiber.fake_stack, block.scheduler_stack, block.scheduler_stack_bytes, &fiber.context,
              &block.scheduler);
}

void Wait(std::function<bool()> can_go_on) {
  Fiber& fiber = *block_now->running;
  fiber.can_go_on = std::move(can_go_on);
  ToScheduler(fiber);
  threadIdx = fiber.thread;
}

void FiberMain() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block_now->scheduler_stack,
                                  &block_now->scheduler_stack_bytes);
#endif
  Fiber& fiber = *block_now->running;
  while (!block_now->to_start.empty()) {
    fiber.thread = block_now->to_start.back();
    block_now->to_start.pop_back();
    threadIdx = fiber.thread;
    fiber.copies.assign(1, {});
    (*block_now->thread)();
  }
  fiber.is_done = true;
  while (true) ToScheduler(fiber);
}

void Resume(Fiber& fiber) {
  Block& block = *block_now;
  block.running = &fiber;
  SwitchStack(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes, &block.scheduler,
              &fiber.context);
}

void RunBlock(Block& block) {
  while (true) {
    bool progress = false;
    // By index: the list grows while it is walked.
    for (size_t i = 0; i < block.fibers.size(); ++i) {
      Fiber& fiber = *block.fibers[i];
      if (fiber.is_done || (fiber.can_go_on && !fiber.can_go_on())) continue;
      fiber.can_go_on = nullptr;
      progress = true;
      Resume(fiber);
    }
    if (!block.to_start.empty()) {
      block.fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *block.fibers.back();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, FiberMain, 0);
      progress = true;
      Resume(fiber);
    }
    bool all_done = block.to_start.empty();
    for (const auto& fiber : block.fibers) all_done = all_done && fiber->is_done;
    if (all_done) return;
    if (!progress) {
      std::fprintf(stderr, "emulated CUDA: the threads of a block wait for each other for ever\n");
      std::abort();
    }
  }
}

}  // namespace

int Lane() {
  return static_cast<int>(Rank() % 32);
}

void* DynamicShared() {
  return block_now->shared.data();
}

void BlockBarrier() {
  Block& block = *block_now;
  const int64_t round = block.barrier_round;
  if (++block.arrived == blockDim.x * blockDim.y * blockDim.z) {
    block.arrived = 0;
    ++block.barrier_round;
    return;
  }
  Wait([&block, round] { return block.barrier_round != round; });
}

uint32_t Exchange(unsigned mask, uint32_t value, int source) {
  const unsigned lane = Rank() % 32;
  if ((mask >> lane & 1) == 0 || (mask >> source & 1) == 0) {
    std::fprintf(stderr, "emulated CUDA: lane %u reads lane %d, mask %08x\n", lane, source, mask);
    std::abort();
  }
  Meeting& meeting = block_now->warp_meetings[{Rank() / 32, mask}];
  const int64_t round = meeting.round;
  meeting.value[round % 2][lane] = value;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    Wait([&meeting, round] { return meeting.round != round; });
  }
  return meeting.value[round % 2][source];
}

namespace {

// Brings all lanes of a warp together; the last one to come does `work` on what they brought.
template <typename Operands, typename Work>
void Together(Operands* mine, const Work& work) {
  const unsigned lane = Rank() % 32;
  Meeting& meeting = block_now->warp_meetings[{Rank() / 32, 0xffffffffu}];
  const int64_t round = meeting.round;
  meeting.operands[lane] = mine;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != 0xffffffffu) {
    Wait([&meeting, round] { return meeting.round != round; });
    return;
  }
  meeting.arrived = 0;
  ++meeting.round;
  Operands* all[32];
  for (int i = 0; i < 32; ++i) all[i] = static_cast<Operands*>(meeting.operands[i]);
  work(all);
}

uint16_t Half(uint32_t word, int index) {
  return static_cast<uint16_t>(word >> (16 * index));
}

}  // namespace

void CopyAsync16(void* to, const void* from, int num_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 ||
      num_bytes < 1 || num_bytes > 16) {
    std::fprintf(stderr, "emulated CUDA: asynchronous copy of %d bytes from %p to %p\n", num_bytes,
                 from, to);
    std::abort();
  }
  std::memset(to, 0xff, 16);
  block_now->running->copies.back().push_back({to, from, num_bytes});
}

void CommitCopies() {
  block_now->running->copies.emplace_back();
}

void WaitForCopies(int num_pending) {
  std::deque<std::vector<AsyncCopy>>& groups = block_now->running->copies;
  while (groups.size() > static_cast<size_t>(num_pending) + 1) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.num_bytes));
    }
    groups.pop_front();
  }
}

void LoadMatrices(bool transposed, uint32_t out[4], const void* row) {
  struct Operands {
    const uint16_t* row;
    uint32_t* out;
  } mine{static_cast<const uint16_t*>(row), out};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "emulated CUDA: row of a matrix at %p\n", row);
    std::abort();
  }
  Together(&mine, [transposed](Operands* const all[32]) {
    for (int m = 0; m < 4; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t two = 0;
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? 2 * (lane % 4) + i : lane / 4;
          const int c = transposed ? lane / 4 : 2 * (lane % 4) + i;
          two |= static_cast<uint32_t>(all[8 * m + r]->row[c]) << (16 * i);
        }
        all[lane]->out[m] = two;
      }
    }
  });
}

void MultiplyAdd(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                 float (*widen)(uint16_t)) {
  struct Operands {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } mine{sum, a, {b0, b1}};
  Together(&mine, [widen](Operands* const all[32]) {
    float wide_a[16][16];
    float wide_b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        const int column = 2 * (lane % 4) + i;
        for (int part = 0; part < 4; ++part) {
          wide_a[lane / 4 + part % 2 * 8][column + part / 2 * 8] =
              widen(Half(all[lane]->a[part], i));
        }
        for (int part = 0; part < 2; ++part) {
          wide_b[column + part * 8][lane / 4] = widen(Half(all[lane]->b[part], i));
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8;
        const int column = 2 * (lane % 4) + e % 2;
        float product = 0.0f;
        for (int k = 0; k < 16; ++k) product += wide_a[row][k] * wide_b[k][column];
        all[lane]->sum[e] += product;
      }
    }
  });
}

void RunGrid(cudaStream_t stream, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
             const std::function<void()>& thread) {
  cudaStreamSynchronize(stream);
  descending = !descending;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        Block one;
        one.thread = &thread;
        // NaN, so that what no thread wrote spoils the result.
        const float nan = std::nanf("");
        one.shared.assign((dynamic_shared_bytes + sizeof(float4) - 1) / sizeof(float4),
                          float4{nan, nan, nan, nan});
        for (unsigned i = 0; i < block.x * block.y * block.z; ++i) {
          one.to_start.push_back(dim3(i % block.x, i / block.x % block.y, i / block.x / block.y));
        }
        if (!descending) one.to_start = {one.to_start.rbegin(), one.to_start.rend()};
        block_now = &one;
        RunBlock(one);
        block_now = nullptr;
      }
    }
  }
}

}  // namespace emulated_cuda
