// Adds up the sums of PLACES pixels for each of OUTPUTS outputs, from START on, and gives the totals. With PLACES = 1
// that is one result for each pixel. START holds what the outputs add, less what their negative weights added too much.
module totals #(
  parameter OUTPUTS = 10,
  parameter IN = 12,
  parameter OUT = 18,
  parameter PLACES = 49,
  parameter [OUTPUTS*OUT-1:0] START = 0
) (
  input wire clk,
  input wire rst,
  input wire in_valid,
  input wire [OUTPUTS*IN-1:0] in_data,
  output reg out_valid,
  output reg [OUTPUTS*OUT-1:0] out_data  // as two's complement
);
  localparam PB = $clog2(PLACES + 1);
  reg [PB-1:0] place;
  wire last = place == PLACES - 1;
  genvar i;
  generate
    for (i = 0; i < OUTPUTS; i = i + 1) begin : output_
      reg [OUT-1:0] so_far;
      wire [IN-1:0] more = in_data[IN*i +: IN];
      wire [OUT-1:0] now = so_far + {{(OUT-IN){1'b0}}, more};  // OUT > IN, for the sign
      always @(posedge clk) begin
        if (rst | (in_valid & last)) so_far <= START[OUT*i +: OUT];
        else if (in_valid) so_far <= now;
        if (in_valid) out_data[OUT*i +: OUT] <= now;
      end
    end
  endgenerate
  always @(posedge clk) begin
    out_valid <= ~rst & in_valid & last;
    if (rst) place <= 0;
    else if (in_valid) place <= last ? 0 : place + 1'b1;
  end
endmodule
