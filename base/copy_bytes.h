// memcpy for rows and pages. glibc before 2.40 copies 2 KiB to half a megabyte by REP MOVSB, which
// AMD's Zen 3 and Zen 4 do at a fraction of their speed when the source lies at the start of a
// memory page and the destination does not (glibc bug 30994), as rows in frames and their readers'
// buffers do: 2.6 GB/s instead of 7.9 was measured.
#ifndef PAGETIDE_BASE_COPY_BYTES_H_
#define PAGETIDE_BASE_COPY_BYTES_H_

#include <cstddef>
#include <span>

namespace pagetide {

// `to` has from.size() bytes at least; the two do not overlap.
void CopyBytes(std::span<const std::byte> from, std::byte* to);

}  // namespace pagetide

#endif  // PAGETIDE_BASE_COPY_BYTES_H_
