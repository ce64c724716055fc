#include "tests/fault/faulty_disk.h"

#include <fcntl.h>
#include <rocksdb/env.h>
#include <rocksdb/file_system.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr char kDeletedSuffix[] = ".deleted";
constexpr uint64_t kSector = 512;

// Of a file that is that long.
void ZeroFile(const std::string& path, uint64_t offset, uint64_t bytes) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  const std::string zeros(bytes, '\0');
  if (!file.write(zeros.data(), static_cast<std::streamsize>(bytes)).flush()) std::perror("write");
}

rocksdb::IOStatus ToIOStatus(const absl::Status& s) {
  return s.ok() ? rocksdb::IOStatus::OK() : rocksdb::IOStatus::IOError(std::string(s.message()));
}

}  // namespace

// ---- segment files -----------------------------------------------------------------------------

class FaultyDisk::SegmentFile final : public File {
 public:
  SegmentFile(FaultyDisk* disk, std::string path, std::unique_ptr<File> real)
      : disk_(disk), path_(std::move(path)), real_(std::move(real)) {}

  absl::Status WriteAt(uint64_t offset, std::span<const std::byte> first,
                       std::span<const std::byte> second) override {
    disk_->WaitWhileStuck();
    PT_RETURN_IF_ERROR(disk_->CheckPower());
    if (disk_->full_) return absl::ResourceExhaustedError(absl::StrCat("write ", path_, ": full"));
    const Range range{offset, first.size() + second.size()};
    disk_->BeginWrite(path_, range);
    const absl::Status written = real_->WriteAt(offset, first, second);
    if (!disk_->EndWrite(path_, range)) return disk_->CheckPower();
    return written;
  }
  absl::StatusOr<uint64_t> ReadAt(uint64_t offset, std::span<std::byte> first,
                                  std::span<std::byte> second) const override {
    disk_->WaitWhileStuck();
    ++disk_->num_reads_;
    PT_RETURN_IF_ERROR(disk_->CheckPower());
    if (disk_->IsUnreadable(path_))
      return absl::UnavailableError(absl::StrCat("read ", path_, ": EIO"));
    return real_->ReadAt(offset, first, second);
  }
  absl::Status Sync() override {
    disk_->WaitWhileStuck();
    return disk_->SyncFile(path_);
  }
  absl::Status DropCacheFrom(uint64_t offset) override { return disk_->DropCache(path_, offset); }
  absl::StatusOr<uint64_t> Size() const override { return real_->Size(); }

 private:
  FaultyDisk* const disk_;
  const std::string path_;
  const std::unique_ptr<File> real_;
};

// ---- the index ---------------------------------------------------------------------------------

class FaultyDisk::IndexFile final : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  IndexFile(FaultyDisk* disk, std::string path, uint64_t size,
            std::unique_ptr<rocksdb::FSWritableFile>&& real)
      : FSWritableFileOwnerWrapper(std::move(real)),
        disk_(disk),
        path_(std::move(path)),
        size_(size) {}

  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           rocksdb::IODebugContext* dbg) override {
    if (const absl::Status s = disk_->CheckPower(); !s.ok()) return ToIOStatus(s);
    const Range range{size_, data.size()};
    disk_->BeginWrite(path_, range);
    const rocksdb::IOStatus s = FSWritableFileOwnerWrapper::Append(data, options, dbg);
    size_ += data.size();
    if (!disk_->EndWrite(path_, range)) return ToIOStatus(disk_->CheckPower());
    return s;
  }
  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           const rocksdb::DataVerificationInfo&,
                           rocksdb::IODebugContext* dbg) override {
    return Append(data, options, dbg);
  }
  rocksdb::IOStatus Sync(const rocksdb::IOOptions&, rocksdb::IODebugContext*) override {
    return ToIOStatus(disk_->SyncFile(path_));
  }
  rocksdb::IOStatus Fsync(const rocksdb::IOOptions&, rocksdb::IODebugContext*) override {
    return ToIOStatus(disk_->SyncFile(path_));
  }
  rocksdb::IOStatus RangeSync(uint64_t, uint64_t, const rocksdb::IOOptions&,
                              rocksdb::IODebugContext*) override {
    return rocksdb::IOStatus::OK();  // a hint: promises nothing
  }

 private:
  FaultyDisk* const disk_;
  const std::string path_;
  uint64_t size_;  // RocksDB appends from one thread at a time
};

class FaultyDisk::IndexFileSystem final : public rocksdb::FileSystemWrapper {
 public:
  explicit IndexFileSystem(FaultyDisk* disk)
      : FileSystemWrapper(rocksdb::FileSystem::Default()), disk_(disk) {}
  const char* Name() const override { return "FaultyDisk"; }

  rocksdb::IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* dbg) override {
    if (const absl::Status s = disk_->CheckPower(); !s.ok()) return ToIOStatus(s);
    rocksdb::IOStatus s = FileSystemWrapper::NewWritableFile(path, options, file, dbg);
    if (s.ok()) Track(path, 0, file);
    return s;
  }
  rocksdb::IOStatus ReopenWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                       std::unique_ptr<rocksdb::FSWritableFile>* file,
                                       rocksdb::IODebugContext* dbg) override {
    if (const absl::Status s = disk_->CheckPower(); !s.ok()) return ToIOStatus(s);
    rocksdb::IOStatus s = FileSystemWrapper::ReopenWritableFile(path, options, file, dbg);
    if (s.ok()) Track(path, (*file)->GetFileSize({}, nullptr), file);
    return s;
  }
  rocksdb::IOStatus ReuseWritableFile(const std::string& path, const std::string& old_path,
                                      const rocksdb::FileOptions& options,
                                      std::unique_ptr<rocksdb::FSWritableFile>* file,
                                      rocksdb::IODebugContext* dbg) override {
    const rocksdb::IOStatus s = RenameFile(old_path, path, {}, dbg);
    return s.ok() ? NewWritableFile(path, options, file, dbg) : s;
  }
  rocksdb::IOStatus DeleteFile(const std::string& path, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* dbg) override {
    if (const absl::Status s = disk_->CheckPower(); !s.ok()) return ToIOStatus(s);
    {
      MutexLock lock(&disk_->mu_);
      disk_->files_.erase(path);
    }
    return FileSystemWrapper::DeleteFile(path, options, dbg);
  }
  rocksdb::IOStatus RenameFile(const std::string& from, const std::string& to,
                               const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* dbg) override {
    if (const absl::Status s = disk_->CheckPower(); !s.ok()) return ToIOStatus(s);
    const rocksdb::IOStatus s = FileSystemWrapper::RenameFile(from, to, options, dbg);
    MutexLock lock(&disk_->mu_);
    if (auto node = disk_->files_.extract(from); s.ok() && !node.empty()) {
      disk_->files_.erase(to);
      node.key() = to;
      disk_->files_.insert(std::move(node));
    }
    return s;
  }

 private:
  void Track(const std::string& path, uint64_t size,
             std::unique_ptr<rocksdb::FSWritableFile>* file) {
    {
      MutexLock lock(&disk_->mu_);
      FileState state;
      state.is_index = true;
      state.synced_size = size;
      disk_->files_[path] = state;
    }
    *file = std::make_unique<IndexFile>(disk_, path, size, std::move(*file));
  }
  FaultyDisk* const disk_;
};

// ---- the disk ----------------------------------------------------------------------------------

FaultyDisk::FaultyDisk()
    : env_(rocksdb::NewCompositeEnv(std::make_shared<IndexFileSystem>(this))) {}
FaultyDisk::~FaultyDisk() = default;

void FaultyDisk::set_stuck(bool on) {
  {
    MutexLock lock(&stuck_mu_);
    is_stuck_ = on;
  }
  unstuck_.SignalAll();
}

void FaultyDisk::set_unreadable_file(std::string path) {
  MutexLock lock(&mu_);
  unreadable_file_ = std::move(path);
}

bool FaultyDisk::IsUnreadable(const std::string& path) const {
  MutexLock lock(&mu_);
  return fail_reads_ || path == unreadable_file_;
}

void FaultyDisk::WaitWhileStuck() const {
  MutexLock lock(&stuck_mu_);
  while (is_stuck_) unstuck_.Wait(&stuck_mu_);
}

absl::Status FaultyDisk::CheckPower() const {
  return power_off_ ? absl::UnavailableError("the power is off") : absl::OkStatus();
}

void FaultyDisk::BeginWrite(const std::string& path, Range range) {
  MutexLock lock(&mu_);
  files_[path].being_written.insert(range);
}

bool FaultyDisk::EndWrite(const std::string& path, Range range) {
  MutexLock lock(&mu_);
  FileState& state = files_[path];
  if (const auto it = state.being_written.find(range); it != state.being_written.end()) {
    state.being_written.erase(it);
  }
  state.unsynced.insert(range);
  return !power_off_;
}

absl::Status FaultyDisk::SyncFile(const std::string& path) {
  ++num_syncs_;
  if (fail_syncs_) {
    MutexLock lock(&mu_);
    FileState& state = files_[path];
    state.lost.insert(state.lost.end(), state.unsynced.begin(), state.unsynced.end());
    state.unsynced.clear();
    return absl::UnavailableError(absl::StrCat("fdatasync ", path, ": EIO"));
  }
  std::multiset<Range> covered;
  {
    MutexLock lock(&mu_);
    PT_RETURN_IF_ERROR(CheckPower());
    if (ignore_syncs_) return absl::OkStatus();
    covered = files_[path].unsynced;
  }
  // What was written before the sync began is on the disk when it ends; what came later is not.
  std::this_thread::yield();
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(CheckPower());
  FileState& state = files_[path];
  for (const Range& range : covered) {
    if (const auto it = state.unsynced.find(range); it != state.unsynced.end()) {
      state.unsynced.erase(it);
    }
    state.synced_size = std::max(state.synced_size, range.offset + range.bytes);
  }
  return absl::OkStatus();
}

absl::Status FaultyDisk::DropCache(const std::string& path, uint64_t from) {
  PT_RETURN_IF_ERROR(CheckPower());
  MutexLock lock(&mu_);
  std::vector<Range>& lost = files_[path].lost;
  for (Range& range : lost) {
    const uint64_t end = range.offset + range.bytes;
    const uint64_t begin = std::max(from, range.offset);
    if (begin >= end) continue;
    ZeroFile(path, begin, end - begin);
    dropped_bytes_ += end - begin;
    range.bytes = begin - range.offset;
  }
  std::erase_if(lost, [](const Range& range) { return range.bytes == 0; });
  return absl::OkStatus();
}

void FaultyDisk::CutPower() {
  MutexLock lock(&mu_);
  power_off_ = true;
}

uint64_t FaultyDisk::dropped_bytes() const {
  MutexLock lock(&mu_);
  return dropped_bytes_;
}

void FaultyDisk::DropUnsynced(uint64_t seed) {
  std::mt19937_64 rng(seed);
  MutexLock lock(&mu_);
  for (auto& [path, state] : files_) {
    state.unsynced.insert(state.being_written.begin(), state.being_written.end());
    struct stat st {};
    if (::stat(path.c_str(), &st) != 0) continue;
    const uint64_t size = static_cast<uint64_t>(st.st_size);
    // The file keeps its synced length, and perhaps a torn piece more.
    const uint64_t kept =
        std::min(size, state.synced_size + (size > state.synced_size && rng() % 2 == 0
                                                ? rng() % (size - state.synced_size + 1)
                                                : 0));
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) continue;
    const std::string zeros(kSector, '\0');
    const bool tear = rng() % 2 == 0;
    for (const Range& range : state.unsynced) {
      // An appended log loses its tail; a segment's ranges are lost by sectors, in any order.
      for (uint64_t at = range.offset; at < std::min(kept, range.offset + range.bytes);
           at += kSector) {
        if (state.is_index || (tear && rng() % 2 == 0)) continue;
        const uint64_t n = std::min(kSector, std::min(kept, range.offset + range.bytes) - at);
        if (::pwrite(fd, zeros.data(), n, static_cast<off_t>(at)) < 0) std::perror("pwrite");
        dropped_bytes_ += n;
      }
    }
    for (const Range& range : state.lost) {
      const uint64_t end = std::min(kept, range.offset + range.bytes);
      if (range.offset >= end) continue;
      ZeroFile(path, range.offset, end - range.offset);
      dropped_bytes_ += end - range.offset;
    }
    dropped_bytes_ += size - kept;
    if (::ftruncate(fd, static_cast<off_t>(kept)) != 0) std::perror("ftruncate");
    ::close(fd);
  }
  for (const std::string& path : created_) {
    if (rng() % 2 == 0) ::unlink(path.c_str());
  }
  for (const std::string& path : deleted_) {
    if (rng() % 2 == 0) {
      ::rename((path + kDeletedSuffix).c_str(), path.c_str());
    } else {
      ::unlink((path + kDeletedSuffix).c_str());
    }
  }
  for (const std::string& dir : created_dirs_) {
    std::error_code ignored;
    if (rng() % 2 == 0) std::filesystem::remove_all(dir, ignored);
  }
  files_.clear();
  created_.clear();
  created_dirs_.clear();
  deleted_.clear();
  power_off_ = false;
}

absl::StatusOr<bool> FaultyDisk::CreateDir(const std::string& dir) {
  PT_RETURN_IF_ERROR(CheckPower());
  PT_ASSIGN_OR_RETURN(const bool created, Posix()->CreateDir(dir));
  MutexLock lock(&mu_);
  if (created) created_dirs_.insert(dir);
  return created;
}

absl::StatusOr<std::unique_ptr<File>> FaultyDisk::CreateFile(const std::string& path) {
  PT_RETURN_IF_ERROR(CheckPower());
  PT_ASSIGN_OR_RETURN(std::unique_ptr<File> real, Posix()->CreateFile(path));
  MutexLock lock(&mu_);
  files_[path] = FileState{};
  created_.insert(path);
  return std::make_unique<SegmentFile>(this, path, std::move(real));
}

absl::StatusOr<std::unique_ptr<File>> FaultyDisk::OpenFile(const std::string& path) {
  PT_RETURN_IF_ERROR(CheckPower());
  PT_ASSIGN_OR_RETURN(std::unique_ptr<File> real, Posix()->OpenFile(path));
  PT_ASSIGN_OR_RETURN(const uint64_t size, real->Size());
  MutexLock lock(&mu_);
  // What was not synced when it was closed is not for being opened again.
  if (const auto [it, is_new] = files_.try_emplace(path); is_new) it->second.synced_size = size;
  return std::make_unique<SegmentFile>(this, path, std::move(real));
}

absl::Status FaultyDisk::DeleteFile(const std::string& path) {
  PT_RETURN_IF_ERROR(CheckPower());
  MutexLock lock(&mu_);
  if (::rename(path.c_str(), (path + kDeletedSuffix).c_str()) != 0) {
    return absl::NotFoundError(absl::StrCat("delete ", path));
  }
  files_.erase(path);
  deleted_.insert(path);
  return absl::OkStatus();
}

absl::Status FaultyDisk::SyncDir(const std::string& dir) {
  ++num_syncs_;
  PT_RETURN_IF_ERROR(CheckPower());
  if (fail_syncs_) return absl::UnavailableError(absl::StrCat("fsync folder ", dir, ": EIO"));
  if (ignore_syncs_) return absl::OkStatus();
  const auto is_in_dir = [&dir](const std::string& path) {
    return std::filesystem::path(path).parent_path() == dir;
  };
  MutexLock lock(&mu_);
  for (const std::string& path : deleted_) {
    if (is_in_dir(path)) ::unlink((path + kDeletedSuffix).c_str());
  }
  for (std::set<std::string>* entries : {&deleted_, &created_, &created_dirs_}) {
    std::erase_if(*entries, is_in_dir);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> FaultyDisk::List(const std::string& dir) {
  PT_RETURN_IF_ERROR(CheckPower());
  PT_ASSIGN_OR_RETURN(std::vector<std::string> names, Posix()->List(dir));
  names.erase(
      std::remove_if(names.begin(), names.end(),
                     [](const std::string& n) { return absl::EndsWith(n, kDeletedSuffix); }),
      names.end());
  return names;
}

absl::StatusOr<uint64_t> FaultyDisk::FreeBytes(const std::string& dir) {
  PT_RETURN_IF_ERROR(CheckPower());
  if (free_bytes_ != 0) return free_bytes_.load();
  if (disk_bytes_ != 0) {
    uint64_t used = 0;
    std::error_code ec;
    for (std::filesystem::recursive_directory_iterator it(dir, ec), end; !ec && it != end;
         it.increment(ec)) {
      std::error_code gone;
      if (absl::EndsWith(it->path().string(), kDeletedSuffix)) continue;
      const uint64_t size = it->is_regular_file(gone) ? it->file_size(gone) : 0;
      if (!gone) used += size;
    }
    return disk_bytes_ > used ? disk_bytes_ - used : 0;
  }
  return Posix()->FreeBytes(dir);
}

}  // namespace pagetide
