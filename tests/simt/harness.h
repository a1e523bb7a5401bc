// What the programs share that run CUDA launchers on the CPU. Each reads one case from standard
// input (a line of numbers, then the arrays) and writes the results to standard output;
// tests/simt/programs.py speaks to them.
//
// Every array lies in an allocation of exactly its size, shifted by `shift` elements, so that the
// address sanitizer sees each read and write outside it, and the alignment sanitizer each vector
// access that the launcher should not have chosen.
#pragma once

#include <iostream>
#include <map>
#include <string>

#include "common/device.cuh"

namespace {

using namespace dnkd;

std::map<std::string, double> numbers;

double number(const char* name) {
  const auto found = numbers.find(name);
  if (found == numbers.end()) {
    std::fprintf(stderr, "harness: no number %s\n", name);
    std::exit(2);
  }
  return found->second;
}

int64_t integer(const char* name) { return static_cast<int64_t>(number(name)); }

class Array {
 public:
  Array(int64_t count, int64_t element, int64_t shift) : bytes_(count * element) {
    memory_ = static_cast<char*>(std::malloc(bytes_ + shift * element));
    data_ = memory_ + shift * element;
    std::memset(memory_, 0xff, bytes_ + shift * element);  // NaN where nothing is written
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void* read() {
    if (std::fread(data_, 1, bytes_, stdin) != static_cast<size_t>(bytes_)) {
      std::fprintf(stderr, "harness: input ended early\n");
      std::exit(2);
    }
    return data_;
  }
  void write() const { std::fwrite(data_, 1, bytes_, stdout); }
  void* data() { return data_; }

 private:
  int64_t bytes_;
  char* memory_;
  char* data_;
};

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Rows `stride` elements apart need no memory behind the last one.
int64_t span(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 ? 0 : (rows - 1) * stride + columns;
}

void check(int error) {
  if (error != 0) {
    std::fprintf(stderr, "harness: launcher returned %d\n", error);
    std::exit(2);
  }
}

// Runs the launcher that the input names.
int run(const std::map<std::string, void (*)()>& launchers) {
  std::string line, name;
  int c;
  while ((c = std::getchar()) != '\n' && c != EOF) {
    line += static_cast<char>(c);
  }
  size_t at = 0;
  while (at < line.size()) {  // NAME=NUMBER separated by blanks; the first word names the launcher
    size_t end = line.find(' ', at);
    end = end == std::string::npos ? line.size() : end;
    const std::string word = line.substr(at, end - at);
    const size_t equals = word.find('=');
    if (equals == std::string::npos) {
      name = word;
    } else {
      numbers[word.substr(0, equals)] = std::strtod(word.c_str() + equals + 1, nullptr);
    }
    at = end + 1;
  }
  simt::multiprocessors = static_cast<int>(integer("multiprocessors"));
  simt::reverse_blocks = integer("reverse_blocks") != 0;
  simt::shared_per_multiprocessor = static_cast<int>(integer("shared"));
  simt::has_clusters = integer("clusters") != 0;
  simt::most_cluster_blocks = static_cast<int>(integer("most_cluster"));
  simt::ptx_version = static_cast<int>(integer("ptx"));
  simt::late = static_cast<int>(integer("late"));
  const auto found = launchers.find(name);
  if (found == launchers.end()) {
    std::fprintf(stderr, "harness: no launcher %s\n", name.c_str());
    return 2;
  }
  found->second();
  const int64_t cluster = integer("cluster");  // 0: any
  if (cluster != 0 && cluster != simt::largest_cluster) {
    std::fprintf(stderr, "harness: clusters of %u blocks\n", simt::largest_cluster);
    return 2;
  }
  return 0;
}

}  // namespace
