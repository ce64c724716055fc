// Two ways to damage one K byte of a stored page, to show that damage is found, or, with checksums
// off, that it would be noticed in the logits. Stateless.
#ifndef PAGETIDE_CLI_DEMO_PLANT_H_
#define PAGETIDE_CLI_DEMO_PLANT_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "clients/cpp/sequence.h"
#include "core/geometry.h"

namespace pagetide::demo {

// Key (32 bytes) of the sequence's page number `index`. FAILED_PRECONDITION if it has none.
absl::StatusOr<std::string> PageKeyOf(const Sequence& sequence, size_t index);

// Flips one bit of the byte in the middle of `needle` wherever it occurs in the files under `dir`,
// as a failing disk would. NOT_FOUND when it occurs nowhere.
absl::Status FlipOnDisk(const std::string& dir, absl::string_view needle);

// Replaces the page of `group` in the store by one that differs in one bit of body[offset] and has
// the checksum of that body: a wrong record which the store itself cannot tell from a right one.
absl::Status ReplaceInStore(const std::string& store_address, const std::string& page_key,
                            const GroupGeometry& group, uint64_t offset);

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_PLANT_H_
