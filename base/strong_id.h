// StrongId<Tag>: a 64-bit number that cannot be mixed up with another kind of number.
#ifndef PAGETIDE_BASE_STRONG_ID_H_
#define PAGETIDE_BASE_STRONG_ID_H_

#include <compare>
#include <cstdint>
#include <utility>

namespace pagetide {

template <typename Tag, typename Rep = uint64_t>
class StrongId {
 public:
  using rep = Rep;
  constexpr StrongId() = default;
  constexpr explicit StrongId(Rep value) : value_(value) {}
  constexpr Rep value() const { return value_; }
  friend constexpr auto operator<=>(StrongId, StrongId) = default;
  template <typename H>
  friend H AbslHashValue(H h, StrongId id) {
    return H::combine(std::move(h), id.value_);
  }

 private:
  Rep value_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_STRONG_ID_H_
