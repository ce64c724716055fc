// Compares two engines for page bodies, as input of docs/adr/0001: RocksDB BlobDB against
// append-only segment files indexed by RocksDB. Both are reduced to what decides: put, get, evict,
// restart.
//
//   store_engine_bench --dir=DIR [--capacity_mib=384] [--restart_mib=1024] > result.json
//
// Workload "churn": pages of 2 MiB, 5 × capacity in total; every fifth page of the first capacity's
// worth is pinned for good (20 % of the capacity); everything else is evicted oldest first. The
// blob engine is told to hold `capacity` logical bytes (all it can be told), the segment engine
// physical bytes. Prints one JSON object a line.
#include <fcntl.h>
#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "bench/seconds_now.h"

namespace pagetide {
namespace {

namespace fs = std::filesystem;
constexpr size_t kPageBytes = 2 << 20;
constexpr size_t kSegmentBytes = 32 << 20;

double CpuSeconds() {
  rusage u{};
  getrusage(RUSAGE_SELF, &u);
  return u.ru_utime.tv_sec + u.ru_stime.tv_sec +
         1e-6 * static_cast<double>(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "store_engine_bench: %s failed: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}
void Check(const rocksdb::Status& s, const char* what) {
  if (!s.ok()) std::fprintf(stderr, "%s\n", s.ToString().c_str());
  Check(s.ok(), what);
}

// Bytes this process caused to be sent to the block layer (buffered writes count when dirtied).
uint64_t BytesWritten() {
  std::ifstream io("/proc/self/io");
  for (std::string line; std::getline(io, line);) {
    if (line.rfind("write_bytes: ", 0) == 0) return std::stoull(line.substr(13));
  }
  return 0;
}

uint64_t PhysicalBytes(const fs::path& dir) {
  uint64_t total = 0;
  std::error_code ec;
  for (auto it = fs::recursive_directory_iterator(dir, ec);
       it != fs::recursive_directory_iterator(); it.increment(ec)) {
    struct stat st {};
    if (::stat(it->path().c_str(), &st) == 0) total += static_cast<uint64_t>(st.st_blocks) * 512;
  }
  return total;
}

void DropFromPageCache(const fs::path& dir) {
  for (const auto& entry : fs::recursive_directory_iterator(dir)) {
    const int fd = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ::fsync(fd);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

std::string KeyOf(uint64_t i) {
  return absl::StrFormat("%032d", i * 0x9e3779b97f4a7c15u % 1000003);
}

// One template page per number; eight bytes differ, which is enough to make every record unique.
void FillPage(uint64_t i, std::string* page) {
  std::memcpy(page->data() + 4096, &i, sizeof(i));
}

class Engine {
 public:
  virtual ~Engine() = default;
  virtual void Put(uint64_t i, const std::string& page, bool pinned) = 0;
  virtual void MakeDurable() = 0;
  // Returns false when the page is absent or its bytes fail verification.
  virtual bool Get(uint64_t i, std::string* page) = 0;
};

// ---- RocksDB BlobDB ----------------------------------------------------------------------------
class BlobEngine final : public Engine {
 public:
  BlobEngine(const std::string& dir, uint64_t capacity, bool wal, bool verify)
      : capacity_(capacity), wal_(wal) {
    rocksdb::Options o;
    o.create_if_missing = true;
    o.write_buffer_size = 64 << 20;
    o.enable_blob_files = true;
    o.min_blob_size = 4096;
    o.blob_file_size = kSegmentBytes;
    o.enable_blob_garbage_collection = true;
    o.blob_garbage_collection_age_cutoff = 1.0;  // the most eager collection it can be asked for
    o.blob_garbage_collection_force_threshold = 0.5;
    o.compression = rocksdb::kNoCompression;
    o.max_background_jobs = 2;
    o.use_direct_io_for_flush_and_compaction = !wal;
    rocksdb::DB* db = nullptr;
    Check(rocksdb::DB::Open(o, dir, &db), "open BlobDB");
    db_.reset(db);
    read_.verify_checksums = verify;
  }
  void Put(uint64_t i, const std::string& page, bool pinned) override {
    rocksdb::WriteOptions w;
    w.disableWAL = !wal_;
    Check(db_->Put(w, KeyOf(i), page), "put");
    logical_ += page.size();
    if (!pinned) order_.push_back(i);
    while (capacity_ != 0 && logical_ > capacity_ && !order_.empty()) {
      Check(db_->Delete(w, KeyOf(order_.front())), "delete");
      order_.pop_front();
      logical_ -= page.size();
    }
  }
  void MakeDurable() override {
    Check(wal_ ? db_->SyncWAL() : db_->Flush(rocksdb::FlushOptions()), "sync");
  }
  bool Get(uint64_t i, std::string* page) override {
    rocksdb::PinnableSlice value;
    if (!db_->Get(read_, db_->DefaultColumnFamily(), KeyOf(i), &value).ok()) return false;
    std::memcpy(page->data(), value.data(), std::min(page->size(), value.size()));
    // Our own check is needed in either case (a record must be verified into the caller's frame).
    return ChecksumOf(std::as_bytes(std::span(value.data(), value.size()))).low != 0;
  }

 private:
  const uint64_t capacity_;
  const bool wal_;
  rocksdb::ReadOptions read_;
  std::unique_ptr<rocksdb::DB> db_;
  std::deque<uint64_t> order_;
  uint64_t logical_ = 0;
};

// ---- Segment files indexed by RocksDB
// ------------------------------------------------------------ Index value: segment, offset,
// length, checksum. Bodies are made durable before index entries.
class SegmentEngine final : public Engine {
 public:
  struct Entry {
    uint64_t segment, offset, length;
    Checksum128 checksum;
  };
  SegmentEngine(const std::string& dir, uint64_t capacity) : dir_(dir), capacity_(capacity) {
    fs::create_directories(dir);
    rocksdb::Options o;
    o.create_if_missing = true;
    rocksdb::DB* db = nullptr;
    Check(rocksdb::DB::Open(o, dir + "/index", &db), "open index");
    db_.reset(db);
    // Restart: the index is read once, so that later look-ups need no disk.
    std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator({}));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      Entry e;
      std::memcpy(&e, it->value().data(), sizeof(e));
      Seg& seg = segments_[e.segment];
      seg.live += e.length;
      next_segment_ = std::max(next_segment_, e.segment + 1);
    }
    for (auto& [id, seg] : segments_) seg.fd = ::open(Path(id).c_str(), O_RDWR | O_CLOEXEC);
  }
  ~SegmentEngine() override {
    for (auto& [id, seg] : segments_) ::close(seg.fd);
  }
  void Put(uint64_t i, const std::string& page, bool pinned) override {
    Append(i, page, pinned, &head_);
    while (capacity_ != 0 && PhysicalNow() + kSegmentBytes > capacity_) Reclaim();
  }
  void MakeDurable() override {
    for (uint64_t id : dirty_) Check(::fdatasync(segments_.at(id).fd) == 0, "fdatasync");
    dirty_.clear();
    rocksdb::WriteOptions w;
    w.sync = true;
    Check(db_->Write(w, &pending_), "index write");
    pending_.Clear();
  }
  bool Get(uint64_t i, std::string* page) override {
    std::string value;
    if (!db_->Get({}, KeyOf(i), &value).ok()) return false;
    Entry e;
    std::memcpy(&e, value.data(), sizeof(e));
    if (e.length > page->size()) return false;
    if (::pread(segments_.at(e.segment).fd, page->data(), e.length, static_cast<off_t>(e.offset)) !=
        static_cast<ssize_t>(e.length)) {
      return false;
    }
    return ChecksumOf(std::as_bytes(std::span(page->data(), e.length))) == e.checksum;
  }

 private:
  struct Seg {
    int fd = -1;
    uint64_t size = 0, live = 0, pinned = 0;
    std::vector<std::pair<uint64_t, bool>> pages;  // number, pinned
  };
  static constexpr uint64_t kNone = ~uint64_t{0};

  std::string Path(uint64_t id) const { return absl::StrFormat("%s/%08d.seg", dir_, id); }
  uint64_t PhysicalNow() const {
    uint64_t n = 0;
    for (const auto& [id, seg] : segments_) n += seg.size;
    return n;
  }
  void Append(uint64_t i, const std::string& page, bool pinned, uint64_t* head) {
    if (*head == kNone || segments_.at(*head).size + page.size() > kSegmentBytes) {
      *head = next_segment_++;
      Seg seg;
      seg.fd = ::open(Path(*head).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
      Check(seg.fd >= 0, "create segment");
      segments_.emplace(*head, std::move(seg));
    }
    Seg& seg = segments_.at(*head);
    const Entry e{*head, seg.size, page.size(), ChecksumOf(std::as_bytes(std::span(page)))};
    Check(::pwrite(seg.fd, page.data(), page.size(), static_cast<off_t>(seg.size)) ==
              static_cast<ssize_t>(page.size()),
          "pwrite");
    seg.size += page.size();
    seg.live += page.size();
    if (pinned) seg.pinned += page.size();
    seg.pages.emplace_back(i, pinned);
    if (std::find(dirty_.begin(), dirty_.end(), *head) == dirty_.end()) dirty_.push_back(*head);
    const rocksdb::Slice value(reinterpret_cast<const char*>(&e), sizeof(e));
    pending_.Put(KeyOf(i), value);
    Check(db_->Write({}, &pending_), "index write");
    pending_.Clear();
  }
  // Frees the sealed segment with the fewest pinned bytes (oldest on a tie): the unpinned pages go,
  // the pinned ones move to a segment of survivors, which is then nearly never chosen again.
  void Reclaim() {
    uint64_t victim = kNone;
    for (const auto& [id, seg] : segments_) {
      if (id == head_ || id == survivors_) continue;
      if (victim == kNone || seg.pinned < segments_.at(victim).pinned) victim = id;
    }
    Check(victim != kNone, "choose a segment");
    Seg old = std::move(segments_.at(victim));
    std::string page(kPageBytes, '\0');
    rocksdb::WriteBatch gone;
    uint64_t at = 0;
    for (const auto& [i, pinned] : old.pages) {
      if (pinned) {
        Check(::pread(old.fd, page.data(), page.size(), static_cast<off_t>(at)) > 0, "pread");
        Append(i, page, true, &survivors_);
      } else {
        gone.Delete(KeyOf(i));
      }
      at += kPageBytes;
    }
    MakeDurable();  // the survivors' new places, before their old place goes
    Check(db_->Write({}, &gone), "index delete");
    dirty_.erase(std::remove(dirty_.begin(), dirty_.end(), victim), dirty_.end());
    ::close(old.fd);
    ::unlink(Path(victim).c_str());
    segments_.erase(victim);
  }

  const std::string dir_;
  const uint64_t capacity_;
  std::unique_ptr<rocksdb::DB> db_;
  rocksdb::WriteBatch pending_;
  std::map<uint64_t, Seg> segments_;
  std::vector<uint64_t> dirty_;
  uint64_t head_ = kNone, survivors_ = kNone, next_segment_ = 0;
};

std::unique_ptr<Engine> Make(const std::string& kind, const std::string& dir, uint64_t capacity,
                             bool verify = true) {
  if (kind == "segments") return std::make_unique<SegmentEngine>(dir, capacity);
  return std::make_unique<BlobEngine>(dir, capacity, kind == "blobdb_wal", verify);
}

void Churn(const std::string& kind, const std::string& dir, uint64_t capacity) {
  fs::remove_all(dir);
  std::string page(kPageBytes, 'k');
  const uint64_t fit = capacity / kPageBytes;
  const uint64_t written0 = BytesWritten();
  const double cpu0 = CpuSeconds();
  const double t0 = SecondsNow();
  uint64_t peak = 0;
  {
    std::unique_ptr<Engine> engine = Make(kind, dir, capacity);
    for (uint64_t i = 0; i < 5 * fit; ++i) {
      FillPage(i, &page);
      engine->Put(i, page, i < fit && i % 5 == 0);
      if (i % 8 == 7) peak = std::max(peak, PhysicalBytes(dir));
    }
    engine->MakeDurable();
    const double seconds = SecondsNow() - t0;
    const uint64_t at_end = PhysicalBytes(dir);
    std::this_thread::sleep_for(std::chrono::seconds(2));  // what idle background work still frees
    uint64_t pinned_ok = 0;
    for (uint64_t i = 0; i < fit; i += 5) pinned_ok += engine->Get(i, &page) ? 1 : 0;
    const double user = static_cast<double>(5 * fit * kPageBytes);
    std::printf(
        "{\"case\":\"churn\",\"engine\":\"%s\",\"capacity\":%lu,\"written\":%.0f,\"peak_ratio\":%."
        "2f,"
        "\"end_ratio\":%.2f,\"idle_ratio\":%.2f,\"write_amplification\":%.2f,\"put_gb_s\":%.2f,"
        "\"cpu_s_per_gb\":%.2f,\"pinned_readable\":%lu,\"pinned\":%lu}\n",
        kind.c_str(), capacity, user, static_cast<double>(peak) / capacity,
        static_cast<double>(at_end) / capacity, static_cast<double>(PhysicalBytes(dir)) / capacity,
        static_cast<double>(BytesWritten() - written0) / user, user / seconds / 1e9,
        (CpuSeconds() - cpu0) / (user / 1e9), pinned_ok, (fit + 4) / 5);
    std::fflush(stdout);
  }
  fs::remove_all(dir);
}

void PutGet(const std::string& kind, const std::string& dir, int run) {
  constexpr uint64_t kPages = 96;  // 192 MiB
  const double gb = kPages * kPageBytes / 1e9;
  std::string page(kPageBytes, 'k');
  for (const int sync_every : {1, 8, 0}) {
    fs::remove_all(dir);
    std::unique_ptr<Engine> engine = Make(kind, dir, 0);
    const double t0 = SecondsNow();
    for (uint64_t i = 0; i < kPages; ++i) {
      FillPage(i, &page);
      engine->Put(i, page, false);
      if (sync_every != 0 && i % sync_every == static_cast<uint64_t>(sync_every) - 1)
        engine->MakeDurable();
    }
    std::printf("{\"case\":\"put\",\"engine\":\"%s\",\"run\":%d,\"sync_every\":%d,\"gb_s\":%.2f}\n",
                kind.c_str(), run, sync_every, gb / (SecondsNow() - t0));
    engine->MakeDurable();
  }
  for (const bool verify : {true, false}) {
    if (!verify && kind == "segments") continue;  // there is only one checksum to pay
    std::unique_ptr<Engine> engine = Make(kind, dir, 0, verify);
    for (const bool cold : {true, false}) {
      if (cold) DropFromPageCache(dir);
      const double cpu0 = CpuSeconds();
      const double t0 = SecondsNow();
      for (uint64_t i = 0; i < kPages; ++i) Check(engine->Get(i, &page), "get");
      std::printf(
          "{\"case\":\"get\",\"engine\":\"%s\",\"run\":%d,\"cache\":\"%s\",\"engine_crc\":%s,"
          "\"gb_s\":%.2f,\"cpu_s_per_gb\":%.2f}\n",
          kind.c_str(), run, cold ? "cold" : "hot", verify && kind != "segments" ? "true" : "false",
          gb / (SecondsNow() - t0), (CpuSeconds() - cpu0) / gb);
    }
  }
  std::fflush(stdout);
  fs::remove_all(dir);
}

// Writes `bytes` and dies without closing anything, as in a crash. Runs in a process of its own.
[[noreturn]] void WriteAndDie(const std::string& kind, const std::string& dir, uint64_t bytes) {
  Engine* engine = Make(kind, dir, 0).release();
  std::string page(kPageBytes, 'k');
  for (uint64_t i = 0; i < bytes / kPageBytes; ++i) {
    FillPage(i, &page);
    engine->Put(i, page, false);
    if (kind != "blobdb_wal" && i % 32 == 31) engine->MakeDurable();
  }
  engine->MakeDurable();
  ::_exit(0);
}

// Times opening what a dead writer left, and one get.
void Restart(const std::string& kind, const std::string& dir, uint64_t bytes) {
  fs::remove_all(dir);
  const std::string command =
      absl::StrFormat("%s --write=%s --dir=%s --restart_mib=%d",
                      fs::read_symlink("/proc/self/exe").string(), kind, dir, bytes >> 20);
  Check(std::system(command.c_str()) == 0, "writer");
  DropFromPageCache(dir);
  std::string page(kPageBytes, '\0');
  const double t0 = SecondsNow();
  std::unique_ptr<Engine> engine = Make(kind, dir, 0);
  Check(engine->Get(0, &page), "get after restart");
  std::printf("{\"case\":\"restart\",\"engine\":\"%s\",\"bytes\":%lu,\"seconds\":%.3f}\n",
              kind.c_str(), bytes, SecondsNow() - t0);
  std::fflush(stdout);
  engine.reset();
  fs::remove_all(dir);
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  std::string dir, write;
  uint64_t capacity_mib = 384, restart_mib = 1024;
  int runs = 5;
  for (int a = 1; a < argc; ++a) {
    const std::string arg = argv[a];
    if (arg.rfind("--dir=", 0) == 0)
      dir = arg.substr(6);
    else if (arg.rfind("--capacity_mib=", 0) == 0)
      capacity_mib = std::stoull(arg.substr(15));
    else if (arg.rfind("--restart_mib=", 0) == 0)
      restart_mib = std::stoull(arg.substr(14));
    else if (arg.rfind("--runs=", 0) == 0)
      runs = std::stoi(arg.substr(7));
    else if (arg.rfind("--write=", 0) == 0)
      write = arg.substr(8);
    else
      dir.clear();
  }
  if (dir.empty()) {
    std::fprintf(
        stderr,
        "usage: store_engine_bench --dir=DIR [--capacity_mib=N] [--restart_mib=N] [--runs=N]\n");
    return 2;
  }
  if (!write.empty()) pagetide::WriteAndDie(write, dir, restart_mib << 20);
  const std::string work = dir + "/store_engine_bench";
  const std::vector<std::string> kinds = {"blobdb_wal", "blobdb_direct", "segments"};
  for (const auto& kind : kinds) pagetide::Restart(kind, work, restart_mib << 20);
  for (const auto& kind : kinds) pagetide::Churn(kind, work, capacity_mib << 20);
  for (int run = 0; run < runs; ++run) {
    for (const auto& kind : kinds) pagetide::PutGet(kind, work, run);
  }
  return 0;
}
