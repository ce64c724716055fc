// An engine with a KV pool of its own in a memfd, laid out at random, as plain as can be: every
// byte of a row is placed by the formula of EnginePlaneSpec, and what the whole memory should hold
// is kept beside it.
#ifndef PAGETIDE_TESTS_WORKER_TEST_ENGINE_H_
#define PAGETIDE_TESTS_WORKER_TEST_ENGINE_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "tests/worker/row_oracle.h"
#include "worker/engine_layout.h"
#include "worker/engine_pools.h"

namespace pagetide {

// A memfd that can be handed over. The descriptor is the caller's.
inline int MakeEngineFd(uint64_t num_bytes, int seals = F_SEAL_SHRINK) {
  const int fd = memfd_create("engine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  EXPECT_GE(fd, 0);
  EXPECT_EQ(ftruncate(fd, static_cast<off_t>(num_bytes)), 0);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, seals), 0);
  return fd;
}

class TestEngine {
 public:
  struct Setup {
    EngineHeads heads = EngineHeads::kNhd;
    bool is_block_major = false;  // all layers of a block side by side
    uint32_t block_tokens = 4;
    uint32_t num_blocks = 32;
    uint64_t padding = 0;        // bytes between what could be dense
    bool names_strides = false;  // instead of leaving them to the worker
  };

  TestEngine(const PageGeometry& geometry, const Setup& setup)
      : geometry_(geometry), setup_(setup) {
    uint64_t at = setup.padding;
    uint64_t block_major_stride = 0;
    spec_.block_tokens = setup.block_tokens;
    spec_.num_blocks = setup.num_blocks;
    ForEachPlane([&](uint32_t g, uint32_t, RowKind kind) {
      block_major_stride += BlockBytes(g, kind) + setup.padding;
    });
    for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
      const LayerGroupSpec& model = geometry.group(g).spec();
      EngineGroupSpec& group = spec_.groups.emplace_back();
      group.heads = setup.heads;
      group.k_type = model.k_type;
      if (model.v_dim > 0) group.v_type = model.v_type;
      group.kv_heads = model.kv_heads;
      group.layers.resize(geometry.group(g).num_layers());
    }
    ForEachPlane([&](uint32_t g, uint32_t layer, RowKind kind) {
      EnginePlaneSpec plane;
      plane.offset = at;
      const uint64_t block_bytes = BlockBytes(g, kind);
      Strides(g, kind, &plane);
      plane.block_stride = setup.is_block_major ? block_major_stride : block_bytes + setup.padding;
      at += setup.is_block_major ? block_bytes + setup.padding
                                 : setup.num_blocks * plane.block_stride;
      EngineGroupSpec::Layer& to = spec_.groups[g].layers[layer];
      (kind == RowKind::kK ? to.k : to.v.emplace()) = plane;
    });
    plain_ = spec_;
    if (!setup.names_strides && setup.padding == 0) {
      for (EngineGroupSpec& group : spec_.groups) {
        for (EngineGroupSpec::Layer& layer : group.layers) {
          Forget(&layer.k);
          if (layer.v) Forget(&*layer.v);
        }
      }
    }
    num_bytes_ = setup.is_block_major ? setup.padding + setup.num_blocks * block_major_stride : at;
    fd_ = MakeEngineFd(num_bytes_);
    void* const data = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    EXPECT_NE(data, MAP_FAILED);
    data_ = static_cast<std::byte*>(data);
    // No byte may change that no load is for: not even a zero to a zero.
    std::mt19937 noise(17);
    for (uint64_t i = 0; i < num_bytes_; ++i) data_[i] = static_cast<std::byte>(noise());
    expected_.assign(data_, data_ + num_bytes_);
  }
  ~TestEngine() {
    munmap(data_, num_bytes_);
    close(fd_);
  }
  TestEngine(const TestEngine&) = delete;
  TestEngine& operator=(const TestEngine&) = delete;

  EnginePools::Registration Registration(const std::string& name, uint64_t client_id = 1) const {
    auto memory = EngineMemory::Map(fd_, num_bytes_);
    EXPECT_TRUE(memory.ok()) << memory.status();
    return {.name = name, .client_id = client_id, .spec = spec_, .memories = {*memory}};
  }
  const EnginePoolSpec& spec() const { return spec_; }
  int fd() const { return fd_; }
  uint64_t num_bytes() const { return num_bytes_; }

  // Blocks for tokens [first, end), none twice, never the null block.
  EngineSlotMap Allocate(uint64_t first, uint64_t end, std::mt19937* random) {
    EngineSlotMap map{.first_token = first, .blocks = {}};
    if (first == end) return map;
    const uint64_t count = (end - 1) / setup_.block_tokens - first / setup_.block_tokens + 1;
    std::vector<uint32_t> free;
    for (uint32_t b = 1; b < setup_.num_blocks; ++b) {
      if (taken_.count(b) == 0) free.push_back(b);
    }
    std::shuffle(free.begin(), free.end(), *random);
    EXPECT_GE(free.size(), count);
    map.blocks.assign(free.begin(), free.begin() + static_cast<int64_t>(count));
    taken_.insert(map.blocks.begin(), map.blocks.end());
    return map;
  }
  void Free(const EngineSlotMap& map) {
    for (uint32_t block : map.blocks) taken_.erase(block);
  }

  // What a prefill of `tokens` leaves in the blocks of [begin, end); and expects it there.
  void Compute(std::span<const uint32_t> tokens, const EngineSlotMap& map, uint64_t begin,
               uint64_t end) {
    Expect(tokens, map, begin, end);
    std::memcpy(data_, expected_.data(), num_bytes_);
  }
  // A load of them is expected to have written their rows.
  void Expect(std::span<const uint32_t> tokens, const EngineSlotMap& map, uint64_t begin,
              uint64_t end) {
    for (uint32_t g = 0; g < geometry_.num_groups(); ++g) {
      ExpectGroup(g, tokens, map, begin, end);
    }
  }
  void ExpectGroup(uint32_t g, std::span<const uint32_t> tokens, const EngineSlotMap& map,
                   uint64_t begin, uint64_t end) {
    const GroupGeometry& group = geometry_.group(g);
    const uint32_t heads = group.spec().kv_heads;
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint32_t row_bytes = group.row_bytes(kind);
        if (row_bytes == 0) continue;
        const EngineGroupSpec::Layer& planes = plain_.groups[g].layers[layer];
        const EnginePlaneSpec& plane = kind == RowKind::kK ? planes.k : *planes.v;
        const std::vector<std::byte> rows =
            RowOracle::Rows(tokens, begin, end, g, layer, kind, row_bytes);
        const uint64_t head_bytes = row_bytes / heads;
        for (uint64_t token = begin; token < end; ++token) {
          const uint64_t index =
              token / setup_.block_tokens - map.first_token / setup_.block_tokens;
          const uint64_t slot = token % setup_.block_tokens;
          for (uint32_t h = 0; h < heads; ++h) {
            std::memcpy(expected_.data() + plane.offset + map.blocks[index] * plane.block_stride +
                            slot * plane.token_stride + h * plane.head_stride,
                        rows.data() + (token - begin) * row_bytes + h * head_bytes, head_bytes);
          }
        }
      }
    }
  }
  // The blocks hold the row of a token in all layers of a group.
  bool HoldsRow(uint32_t g, std::span<const uint32_t> tokens, const EngineSlotMap& map,
                uint64_t token) const {
    const GroupGeometry& group = geometry_.group(g);
    const uint32_t heads = group.spec().kv_heads;
    const uint64_t index = token / setup_.block_tokens - map.first_token / setup_.block_tokens;
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint32_t row_bytes = group.row_bytes(kind);
        if (row_bytes == 0) continue;
        const EngineGroupSpec::Layer& planes = plain_.groups[g].layers[layer];
        const EnginePlaneSpec& plane = kind == RowKind::kK ? planes.k : *planes.v;
        const std::vector<std::byte> row =
            RowOracle::Rows(tokens, token, token + 1, g, layer, kind, row_bytes);
        for (uint32_t h = 0; h < heads; ++h) {
          const std::byte* const at =
              data_ + plane.offset + map.blocks[index] * plane.block_stride +
              token % setup_.block_tokens * plane.token_stride + h * plane.head_stride;
          const uint64_t head_bytes = row_bytes / heads;
          if (std::memcmp(at, row.data() + h * head_bytes, head_bytes) != 0) return false;
        }
      }
    }
    return true;
  }
  // Bytes of the memory that are not what they should be.
  uint64_t WrongBytes() const {
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < num_bytes_; ++i) wrong += data_[i] != expected_[i];
    return wrong;
  }

 private:
  template <typename Visit>
  void ForEachPlane(Visit visit) const {
    for (uint32_t g = 0; g < geometry_.num_groups(); ++g) {
      for (uint32_t layer = 0; layer < geometry_.group(g).num_layers(); ++layer) {
        visit(g, layer, RowKind::kK);
        if (geometry_.group(g).v_row_bytes() > 0) visit(g, layer, RowKind::kV);
      }
    }
  }
  uint64_t HeadBytes(uint32_t g, RowKind kind) const {
    return geometry_.group(g).row_bytes(kind) / geometry_.group(g).spec().kv_heads;
  }
  void Strides(uint32_t g, RowKind kind, EnginePlaneSpec* plane) const {
    const uint64_t head = HeadBytes(g, kind) + setup_.padding;
    const uint64_t heads = geometry_.group(g).spec().kv_heads;
    const bool is_nhd = setup_.heads == EngineHeads::kNhd;
    plane->head_stride = is_nhd ? head : head * setup_.block_tokens;
    plane->token_stride = is_nhd ? head * heads : head;
  }
  uint64_t BlockBytes(uint32_t g, RowKind kind) const {
    return (HeadBytes(g, kind) + setup_.padding) * geometry_.group(g).spec().kv_heads *
           setup_.block_tokens;
  }
  // The strides that are the dense ones.
  void Forget(EnginePlaneSpec* plane) const {
    plane->head_stride = plane->token_stride = 0;
    if (!setup_.is_block_major) plane->block_stride = 0;
  }

  const PageGeometry geometry_;
  const Setup setup_;
  EnginePoolSpec spec_;   // as registered
  EnginePoolSpec plain_;  // with all strides
  uint64_t num_bytes_ = 0;
  int fd_ = -1;
  std::byte* data_ = nullptr;
  std::vector<std::byte> expected_;
  std::set<uint32_t> taken_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_TEST_ENGINE_H_
